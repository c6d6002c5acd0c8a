"""Training of masked-diffusion models: the gradient for any split, against plain logits; resume; what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import hapo
from hapo import masked
from hapo.engines.trl.diffusion import switch_off_dropout
from hapo.engines.trl.rows import RolloutRows
from hapo.engines.trl.views import NOISE, NOW, DiffusionScorer
from hapo.parts.elbo import Elbo, contributions
from hapo.trl import DiffusionConfig, DiffusionTrainer
from tests.engines import fixed_diffusion, tiny
from tests.engines.fixed_diffusion import HERE, LENGTH, model, tokenizer
from tests.engines.fixed_rollout import Gradients

SCHEDULE = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "num_generations": 4,
    "max_completion_length": LENGTH,
    "block_length": 4,
    "diffusion_steps": 4,
    "learning_rate": 0.005,
}
"""Rollouts of 16 answers of 8 positions in 2 blocks, each used for two optimiser steps."""


def trainer(
    folder: Path | str, net: Any = None, reward: Any = tiny.count_digits, **options: Any
) -> DiffusionTrainer:
    kwargs = {k: options.pop(k) for k in ("peft_config", "rollout_func", "demonstrations") if k in options}
    return options.pop("kind", DiffusionTrainer)(
        model() if net is None else net,
        reward,
        DiffusionConfig(str(folder), **{**HERE, **SCHEDULE, **options}),
        train_dataset=tiny.data(),
        processing_class=tokenizer(),
        **kwargs,
    )


def gradients(folder: Path, per_device: int, accumulation: int, **options: Any) -> list[dict[str, torch.Tensor]]:
    """What three optimiser steps on one rollout give the optimiser."""
    keep = Gradients()
    steps = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
    schedule = {
        "steps_per_generation": accumulation,
        "num_iterations": 3,
        "max_steps": 3,
        "optim": "sgd",
        "max_grad_norm": 0.0,
    }
    run = trainer(folder, **steps, **schedule, lr_scheduler_type="constant", **options)
    run.add_callback(keep)
    run.train()
    return keep.steps


@pytest.mark.parametrize("method", ["espo", "diffu_grpo"])
def test_the_gradient_does_not_depend_on_the_micro_batch(method, tmp_path):
    model().save_pretrained(tmp_path / "model")
    options = {"method": method, "beta": 0.02, "net": str(tmp_path / "model"), "learning_rate": 0.01}
    whole = gradients(tmp_path / "whole", 16, 1, **options)
    for per_device, accumulation, most in [(2, 8, None), (8, 2, 60), (4, 4, 0)]:
        folder = tmp_path / f"{per_device}"
        split = gradients(folder, per_device, accumulation, tokens_per_pass=most, **options)
        for one, other in zip(whole, split, strict=True):
            scale = max(g.abs().max().item() for g in one.values())
            assert scale > 1e-4
            assert max((one[n] - other[n]).abs().max().item() for n in one) <= 2e-5 * scale


@pytest.mark.xdist_group("two_ranks")
@pytest.mark.parametrize("method", ["espo", "diffu_grpo"])
def test_the_gradient_does_not_depend_on_the_ranks(method, two_ranks):
    """Twelve rows in groups of four: on two ranks the second group straddles them."""
    ranks = load_file(two_ranks / f"{method}.safetensors")
    for i, step in enumerate(fixed_diffusion.run(12, method=method)):
        scale = max(g.abs().max().item() for g in step.values())
        assert scale > 1e-4
        assert max((g - ranks[f"{i}.{n}"]).abs().max().item() for n, g in step.items()) <= 2e-5 * scale


@pytest.mark.parametrize("method", ["espo", "diffu_grpo"])
def test_engine_equals_core(method, tmp_path):
    """Loss of both uses of a rollout, from all logits of each view on its own, in plain torch."""
    seen = []

    class Watched(DiffusionTrainer):
        def _pass_loss(self, model, inputs, mask, records):
            weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}
            seen.append((weights, {k: copy.deepcopy(v) for k, v in inputs.items()}))
            return super()._pass_loss(model, inputs, mask, records)

    options = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "steps_per_generation": 1}
    options |= {"max_steps": 2, "learning_rate": 0.05, "tokens_per_pass": 0, "kind": Watched}
    run = trainer(tmp_path, method=method, beta=0.0, **options)
    run.train()
    core, net = hapo.method(method, kl_coef=0.0), model()
    likelihood, mask_id = core.likelihood, tokenizer().mask_token_id

    def logps(weights, inputs, use):
        net.load_state_dict(weights)
        prompt = inputs["prompt_mask"].bool()
        hidden, weight = likelihood.views(inputs[NOISE][:, use], prompt, LENGTH)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        rows = []
        for i in range(len(ids)):
            kept = torch.cat([prompt[i], torch.ones(LENGTH, dtype=torch.bool)])  # one row, no padding
            shown = ids[i].masked_fill(hidden[i], mask_id)[:, kept]
            logp = net(input_ids=shown).logits.log_softmax(-1)[:, -LENGTH:]
            rows.append(logp.gather(-1, ids[i, -LENGTH:].expand(len(shown), -1)[..., None])[..., 0])
        return contributions(torch.stack(rows), weight)

    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    for use, (weights, inputs) in enumerate(seen):
        with torch.no_grad():
            old, new = logps(seen[0][0], inputs, use), logps(weights, inputs, use)
        whole = torch.ones(16, LENGTH, dtype=torch.bool)
        up_to_end = (inputs["completion_ids"] == 1).cumsum(1) - (inputs["completion_ids"] == 1).long() == 0
        batch = hapo.TokenBatch(
            mask=whole if method == "espo" else up_to_end,
            old_logp=old,
            logp=new,
            reward=inputs["verdict"],
            group=RolloutRows.of(inputs).batch.group,
        )
        loss = core.loss(core.step(core.prepare(batch))).loss.item()
        assert losses[use] == pytest.approx(loss, abs=2e-6)
    assert abs(losses[1]) > 1e-3
    assert not torch.equal(seen[0][1][NOW], seen[1][1][NOW])  # each use has noise of its own


@pytest.mark.parametrize("method", ["espo", "diffu_grpo"])
def test_resume_inside_a_rollout_is_bit_for_bit(method, tmp_path):
    """A rollout is used for four optimiser steps; the checkpoint is of the third, and the next rollout follows."""
    net = model()
    net.save_pretrained(tmp_path / "model")
    options = {"method": method, "num_iterations": 4, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    options |= {"beta": 0.01}
    whole = trainer(tmp_path / "whole", str(tmp_path / "model"), **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", str(tmp_path / "model"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), whole.model.parameters(), strict=True))
    last = [[line for line in t.state.log_history if "loss" in line][-1] for t in (whole, resumed)]
    assert last[0]["loss"] == last[1]["loss"]


def test_at_the_first_use_every_ratio_is_one_and_the_second_sees_other_masks(tmp_path):
    run = trainer(tmp_path, max_steps=4, learning_rate=1e-9)
    run.train()
    ratios = [line["ratio/mean"] for line in run.state.log_history if "ratio/mean" in line]
    assert ratios == pytest.approx([1.0] * 4, abs=1e-5)
    noise = torch.cat([inputs[NOISE] for inputs in run._buffered_inputs])
    assert not torch.equal(noise[:, 0], noise[:, 1])


def test_only_hidden_positions_of_the_response_meet_the_output_layer(tmp_path, monkeypatch):
    run = trainer(tmp_path, max_steps=1)
    counted, real = [], masked.score_states

    def counting(net, states, tokens, **options):
        counted.append((len(states), torch.is_grad_enabled()))
        return real(net, states, tokens, **options)

    monkeypatch.setattr(masked, "score_states", counting)
    seen_by_head = []
    run.model.lm_head.register_forward_hook(lambda m, args, out: seen_by_head.append(args[0].shape[1]))
    run.train()
    training = [n for n, grad in counted if grad]
    draws = run.method.likelihood.draws
    assert sum(training) == 16 * draws * LENGTH  # coupled: each position once a draw
    assert set(seen_by_head) <= {0, 4}  # no column in scoring, a block's in decoding


def test_views_of_a_shifted_model_read_the_position_before(tmp_path):
    net = model().eval()
    ids = torch.randint(2, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    wanted = torch.zeros(3, 7, dtype=torch.bool)
    wanted[:, 3:] = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    shown, attention = ids.masked_fill(wanted, tokenizer().mask_token_id), torch.ones_like(ids)
    with torch.no_grad():
        logp = net(input_ids=shown).logits.log_softmax(-1)
    for shifted in (False, True):
        at = logp.roll(1, 1) if shifted else logp
        expected = at.gather(-1, ids[..., None])[..., 0].masked_fill(~wanted, 0.0)
        scored, entropy = masked.masked_scores(net, net, shown, attention, ids, wanted, shifted=shifted)
        torch.testing.assert_close(scored, expected)
        torch.testing.assert_close(entropy, -(at.exp() * at).sum(-1).masked_fill(~wanted, 0.0))
    changed = shown.clone()
    changed[:, -1] = 5  # full attention: the last token matters to the first
    with torch.no_grad():
        assert not torch.allclose(net(input_ids=changed).logits[:, 0], net(input_ids=shown).logits[:, 0])


@pytest.mark.parametrize("method", ["espo", "diffu_grpo"])
def test_an_answer_ends_for_the_reward_and_for_token_ratios_but_not_for_the_elbo(method, tmp_path):
    texts = []

    def reward(completions, completion_ids, **_):
        texts.extend(zip(completions, completion_ids, strict=True))
        return [float(len(c) % 2) for c in completions]

    run = trainer(tmp_path, reward=reward, method=method, beta=0.0, max_steps=1)
    with torch.no_grad():
        run.model.lm_head.weight[1] = run.model.lm_head.weight[5] * 1.05  # some end early
    run.train()
    ids = torch.cat([inputs["completion_ids"] for inputs in run._buffered_inputs])
    mask = torch.cat([RolloutRows.of(inputs).batch.mask for inputs in run._buffered_inputs])
    assert ids.shape[1] == LENGTH and (ids != tokenizer().mask_token_id).all()
    lengths = (((ids == 1).cumsum(1) - (ids == 1).long()) == 0).sum(1)
    assert len(set(lengths.tolist())) > 1
    assert mask.sum(1).tolist() == ([LENGTH] * 16 if method == "espo" else lengths.tolist())
    assert sorted(len(kept) for _, kept in texts) == sorted(lengths.tolist())
    assert all(len(text) == sum(t > 1 for t in kept) for text, kept in texts)


def test_lora_with_the_penalty_and_dynamic_sampling_in_half_of_the_rounds(tmp_path):
    """The reference is the model with its adapter off; groups of equal verdicts are replaced, noise and all."""
    run = trainer(
        tmp_path,
        reward=tiny.half_mixed,
        beta=0.05,
        method_options={"filter_groups": True},
        max_num_gen_batches=4,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.1, r=4),
        max_steps=3,
        learning_rate=0.05,
    )
    assert not any(m.p for m in run.model.modules() if isinstance(m, torch.nn.Dropout))
    run.train()
    lines = [line for line in run.state.log_history if "loss" in line]
    assert lines[0]["dynamic_sampling/rounds"] > 1
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-7) and lines[1]["kl"] > 1e-6
    assert all(line["grad_norm"] > 0 for line in lines[:2])


def test_each_rank_has_its_rows_of_the_same_noise():
    def drawn(rows: int, rank: tuple[int, int]) -> torch.Tensor:
        scorer = DiffusionScorer(Elbo(), 1.0, torch.no_grad, lambda net: net, mask_id=0, shifted=False, rank=rank)
        scorer.begin(seed=3, uses=2)
        return scorer._draw(rows, LENGTH)

    assert torch.equal(torch.cat([drawn(6, (0, 2)), drawn(6, (1, 2))]), drawn(12, (0, 1)))


def test_dropout_is_switched_off():
    net = model(attention_dropout=0.3)
    assert switch_off_dropout(net) == 2 and switch_off_dropout(net) == 0


def test_evaluation_and_records(tmp_path):
    run = trainer(tmp_path, max_steps=2, run_records=True, record_tokens_every=1)
    run.train()
    tokens = pd.read_parquet(tmp_path / "tokens")
    assert len(tokens) == 2 * 16 * LENGTH and set(tokens["step"]) == {1, 2}
    ids = torch.cat([inputs["completion_ids"] for inputs in run._buffered_inputs])
    places = torch.cat([inputs["hapo_response"] for inputs in run._buffered_inputs])
    for step, response in [(1, 0), (2, int(places[3]))]:
        rows = tokens[(tokens["step"] == step) & (tokens["response"] == response)].sort_values("position")
        assert rows["id"].tolist() == ids[places == response][0].tolist()
        counts = rows["unmasked"].value_counts(sort=False)
        assert counts.to_dict() == {
            float(i): 2 for i in range(4)
        }  # two blocks, two passes each, two tokens a pass
        assert set(rows["unmasked"][:4]) == {0.0, 1.0}
        assert rows["confidence"].between(0, 1, inclusive="neither").all()
    before = run.state.global_step
    metrics = run.evaluate(eval_dataset=tiny.data(8))
    assert metrics["eval_loss"] == pytest.approx(0.0, abs=1e-6) and run.state.global_step == before


@pytest.mark.parametrize("name", ["espo", "diffu_grpo"])
@pytest.mark.parametrize("by", ["name", "object"])
def test_the_trainer_of_autoregressive_models_refuses_methods_of_diffusion_models(name, by, tmp_path):
    given = {"method": name, "beta": 0.0} if by == "name" else {"method_object": hapo.method(name, kl_coef=0.0)}
    with pytest.raises(ValueError, match=f"'{name}' is one of masked-diffusion models.*hapo.trl.DiffusionTrainer"):
        tiny.trainer(tmp_path, **given)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "gspo"}, "'gspo' reads the log-prob of each token given those before it.*diffu_grpo, espo"),
        ({"method": "hapo", "method_options": {"components": "A"}}, "'hapo' reads the log-prob of each token"),
        ({"method_options": {"temperature": {"tau": 0.1}}}, "temperature must be None"),
        ({"use_vllm": True}, "use_vllm=True cannot be honoured.*from left to right"),
        ({"top_p": 0.9}, "top_p=0.9 cannot be honoured.*a temperature alone"),
        ({"generation_kwargs": {"num_beams": 2}}, "cannot be honoured"),
        ({"block_length": 3}, "blocks of 3 do not fill a response of 8"),
        ({"rollout_func": print}, "rollout_func cannot be honoured"),
        ({"demonstrations": [{"prompt": "1", "completion": "1"}]}, "demonstrations cannot be honoured"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_a_diffusion_model_cannot_do_is_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, **options)


def test_a_model_without_a_mask_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'llama' has no mask token.*random tokens"):
        DiffusionTrainer(
            tiny.model(is_causal=False),
            tiny.count_digits,
            DiffusionConfig(str(tmp_path), **HERE, **SCHEDULE),
            train_dataset=tiny.data(),
            processing_class=tiny.tokenizer(),
        )
    with pytest.raises(TypeError, match="args must be a DiffusionConfig"):
        DiffusionTrainer(model(), tiny.count_digits, tiny.config(tmp_path))


def test_rewards_per_token_stop_at_the_end_of_the_text(tmp_path):
    """As long as the tokens up to the end of sequence, which is what a reward function sees."""
    seen: list[list[int]] = []

    def by_place(completion_ids, **_):
        seen.extend(completion_ids)
        return [[float(place) for place in range(len(ids))] for ids in completion_ids]

    run = trainer(
        tmp_path, reward=by_place, method="diffu_grpo", method_options={"advantage": "token_reward"}, beta=0.0
    )
    run.args.max_steps = 1
    run.train()
    for inputs in run._buffered_inputs:
        batch = RolloutRows.of(inputs).batch
        expected = torch.arange(LENGTH).float().expand_as(batch.mask).where(batch.mask, 0.0)
        assert torch.equal(batch.token_reward.where(batch.mask, 0.0), expected)
        assert batch.mask.sum() > 0
    assert max(map(len, seen)) <= LENGTH
