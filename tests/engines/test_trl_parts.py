"""The parts of the TRL engine by themselves; what a subclass of the trainer may add or swap."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict, use_adapter

import hapo
from hapo.engines.records import RunRecords
from hapo.engines.trl import auxiliary, checkpoint, passes
from hapo.engines.trl.drawn import DrawnScores
from hapo.engines.trl.entropy_term import EntropyTerm
from hapo.engines.trl.metrics import MetricLog
from hapo.engines.trl.recorder import Recorder
from hapo.engines.trl.rollout import DynamicSampling, check_prompts
from hapo.engines.trl.rows import RolloutRows, prepare_rows, step_rows, whole_groups, without_step
from hapo.engines.trl.sampler import Turn
from hapo.engines.trl.scorer import Scored, Scorer, Sequences, is_reference
from hapo.samplers.decoding import Draws
from hapo.scoring import attach_scoring
from hapo.trl import AuxiliaryLoss, HAPOConfig, HAPOTrainer, Sampler
from tests.engines import fixed_rollout, tiny

GRPO = hapo.method("grpo", kl_coef=0.0)
LENGTHS = torch.tensor([3, 1, 4, 2, 4, 3, 1, 2])


@pytest.fixture
def args(tmp_path) -> HAPOConfig:
    """Four optimiser steps a rollout batch."""
    options = {"record_tokens_every": 3, "record_tokens_rows": 4, "temperature": 0.7, "max_num_gen_batches": 10}
    return tiny.config(tmp_path, **options)


@pytest.fixture
def alone(args) -> Accelerator:
    """One process. A config made later would reset its state."""
    return Accelerator(cpu=True)


def rollout() -> dict:
    """TRL's dict of two prompts with four responses each, scored and rewarded; the third could not be judged."""
    g = torch.Generator().manual_seed(0)
    mask = (torch.arange(4) < LENGTHS.unsqueeze(1)).long()
    return {
        "prompt_ids": torch.arange(8).unsqueeze(1) // 4 + 5,
        "prompt_mask": torch.ones(8, 1, dtype=torch.long),
        "completion_ids": torch.randint(2, 20, (8, 4), generator=g),
        "completion_mask": mask,
        "advantages": torch.zeros(8),
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": -torch.rand(8, 4, generator=g),
        "old_entropies": torch.rand(8, 4, generator=g) + 0.1,
        "sampling_per_token_logps": -torch.rand(8, 4, generator=g),
        "verdict": torch.tensor([1.0, 0.0, torch.nan, 1.0, 0.0, 0.0, 1.0, 1.0]),
    }


def prepared(method: hapo.Method, accelerator: Accelerator, **options) -> dict:
    inputs = rollout()
    prepare_rows(method, inputs, accelerator, group_size=4, **options).rows.put(inputs)
    return inputs


def test_rows_stay_together_through_trls_shuffle_and_split(alone):
    inputs = prepared(hapo.method("hapo", filter_groups=False), alone)
    whole = RolloutRows.of(inputs)
    parts = split_tensor_dict(shuffle_sequence_dict(inputs), 4)
    for part in parts:
        rows = RolloutRows.of(part)
        assert rows.responses == 7 and rows.batch.keep is rows.batch.totals is None
        expected = whole.batch.rows(rows.response)
        for name in ("mask", "advantage", "signal", "weight", "old_logp", "sampler_logp", "reward", "group"):
            torch.testing.assert_close(getattr(rows.batch, name), getattr(expected, name), equal_nan=True)
        assert torch.equal(part["completion_mask"].sum(1), LENGTHS[rows.response])
    assert sorted(torch.cat([RolloutRows.of(part).response for part in parts]).tolist()) == list(range(8))


def dealt(mixed: list[bool], steps: int, parts: int, seed: int) -> tuple[list[dict], list[dict]]:
    """A rollout batch of groups of four, of which some have a token, as TRL leaves it, and with whole groups."""
    group = torch.arange(len(mixed)).repeat_interleave(4)
    rows = torch.arange(len(group))
    mask = torch.tensor(mixed)[group].unsqueeze(1) & torch.tensor([[True, False]])
    batch = {"hapo_group": group, "hapo_mask": mask, "row": rows, "note": [str(i) for i in rows.tolist()]}
    torch.manual_seed(seed)
    shuffled = split_tensor_dict(shuffle_sequence_dict({**batch, "of_all": torch.tensor(3), "none": None}), parts)
    return shuffled, whole_groups(shuffled, steps)


def test_whole_groups_are_dealt_to_the_steps_as_the_shuffle_met_them():
    mixed = [True, False, True, True, False, True, True, False]
    orders = set()
    for seed in range(6):
        shuffled, parts = dealt(mixed, steps=4, parts=4, seed=seed)
        met = list(dict.fromkeys(torch.cat([part["hapo_group"] for part in shuffled]).tolist()))
        met.sort(key=lambda group: not mixed[group])  # stable
        for step, part in enumerate(parts):
            assert list(dict.fromkeys(part["hapo_group"].tolist())) == met[step::4]
            assert part["hapo_mask"].any()  # five groups to learn from, in four steps
            assert torch.equal(part["row"] // 4, part["hapo_group"])
            assert part["note"] == [str(row) for row in part["row"].tolist()]
            assert (part["of_all"], part["none"]) == (3, None)
        assert sorted(torch.cat([part["row"] for part in parts]).tolist()) == list(range(32))
        orders.add(tuple(met))
    assert len(orders) == 6


def test_a_whole_group_may_go_through_several_micro_batches_of_its_step():
    _, parts = dealt([True] * 4, steps=2, parts=8, seed=0)
    assert [len(part["row"]) for part in parts] == [2] * 8
    first, second = ({g for part in half for g in part["hapo_group"].tolist()} for half in (parts[:4], parts[4:]))
    assert len(first) == len(second) == 2 and not first & second


def test_what_cannot_move_with_its_rows_is_refused(tmp_path):
    part = {"hapo_group": torch.zeros(4), "hapo_mask": torch.ones(4, 1, dtype=torch.bool)}
    with pytest.raises(
        TypeError, match="whole_groups=True cannot move 'tiles', a list, with the rows: leave it out"
    ):
        whole_groups([{**part, "tiles": [1, 2]}], 1)
    with pytest.raises(ValueError, match=r"images \(the column image\) cannot: leave it out"):
        check_prompts(
            Dataset.from_dict({"prompt": ["a"], "image": ["b"]}), tiny.config(tmp_path, whole_groups=True)
        )


def test_a_field_without_a_value_leaves_the_inputs(alone):
    inputs = prepared(GRPO, alone, one_step=True)
    assert RolloutRows.of(inputs).batch.totals == hapo.StepTotals(7, 16, 16)
    assert RolloutRows.of(without_step(inputs)).batch.totals is None
    rows = RolloutRows.of(without_step(inputs))
    rows.put(inputs)
    assert RolloutRows.of(inputs).batch.totals is None


def test_prepared_rows_are_what_the_core_makes(alone):
    inputs = rollout()
    inputs["sampling_per_token_logps"][0, 0] = torch.nan  # unknown: as if drawn from the old policy
    inputs["tool_mask"] = torch.ones(8, 4, dtype=torch.long)
    inputs["tool_mask"][4, 1] = 0
    made = prepare_rows(GRPO, inputs, alone, group_size=4, punish=lambda length: -0.1 * length)
    mask = inputs["completion_mask"].bool()
    mask[2], mask[4, 1] = False, False
    assert torch.equal(made.scored, mask)
    reward = inputs["verdict"] - 0.1 * mask.sum(1)
    old, sampler = inputs["old_per_token_logps"], inputs["sampling_per_token_logps"]
    core = GRPO.prepare(
        hapo.TokenBatch(
            mask=mask,
            old_logp=old,
            sampler_logp=torch.where(sampler.isnan(), old, sampler),
            reward=reward,
            verdict=inputs["verdict"],
            group=torch.arange(8) // 4,
        )
    )
    mine = made.rows.batch
    torch.testing.assert_close(mine.advantage, core.advantage, rtol=0, atol=0)
    torch.testing.assert_close(mine.weight, core.weight, rtol=0, atol=0)
    assert mine.weight[0, 0] == 1
    torch.testing.assert_close(mine.reward, reward, equal_nan=True)
    assert torch.equal(mine.old_logp, old)  # as they were, masked or not
    assert made.rows.responses == 7


def test_a_step_counts_its_micro_batches_and_asks_for_scores_only_where_they_matter(alone):
    parts = split_tensor_dict(prepared(GRPO, alone), 4)
    rows = [RolloutRows.of(part) for part in parts[:2]]
    made = step_rows(GRPO, rows, alone, None, lambda i: pytest.fail("nobody reads these scores"))
    assert {r.batch.totals for r in made} == {hapo.StepTotals(3, 6, 6)}

    chooser = hapo.method("forking_tokens", filter_groups=False, rho=0.5)
    parts = split_tensor_dict(prepared(chooser, alone), 4)
    rows = [RolloutRows.of(part) for part in parts[:2]]
    entropy = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
    made = step_rows(chooser, rows, alone, None, lambda i: (-entropy[2 * i :][:2], entropy[2 * i :][:2]))
    whole = RolloutRows.of(prepared(chooser, alone)).batch.rows(slice(4))
    core = chooser.step(whole.replace(logp=-entropy, entropy=entropy))
    assert torch.equal(torch.cat([r.batch.keep for r in made]), core.keep)
    assert made[0].batch.totals == core.totals and 0 < core.totals.kept < core.totals.tokens


def scorer(accelerator: Accelerator, trl_pass=None) -> Scorer:
    return Scorer(0.7, accelerator.autocast, DrawnScores(accelerator), trl_pass)


def text(rows: int = 4) -> Sequences:
    ids = torch.randint(2, 20, (rows, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(4) < torch.arange(1, rows + 1).unsqueeze(1)
    attention = torch.cat([torch.ones(rows, 2), mask], 1).long()
    return Sequences(ids, attention, mask, {})


def test_the_scorer_needs_no_trainer(alone):
    net = tiny.model()
    attach_scoring(net)
    mine, rows = scorer(alone), text()
    now = mine.current(net, rows)
    logits = net(input_ids=rows.ids, attention_mask=rows.attention).logits[:, 1:-1] / 0.7
    logp = logits.log_softmax(-1).gather(-1, rows.ids[:, 2:, None])[..., 0].masked_fill(~rows.mask, 0)
    torch.testing.assert_close(now.logp, logp, atol=1e-5, rtol=0)
    assert now.logp.requires_grad and now.entropy.requires_grad and now.router_loss is None
    old = mine.old(net, rows, 3)
    torch.testing.assert_close(old.logp, now.logp.detach(), atol=1e-5, rtol=0)
    assert not old.logp.requires_grad
    torch.testing.assert_close(mine.reference(net, rows, 1).logp, old.logp, atol=1e-5, rtol=0)


def test_what_was_drawn_stands_for_the_old_policy_once_both_agree(alone):
    net = tiny.model()
    attach_scoring(net)
    mine, rows = scorer(alone), text()
    known = mine.old(net, rows, None)
    drawn = Draws(rows.ids[:, 2:], known.logp, known.logp + 1e-6, known.entropy)
    for _ in range(2):
        mine.old(net, rows, None, [drawn])  # scored as well, to compare
    mine.text = lambda *_: pytest.fail("it is known")
    assert torch.equal(mine.old(net, rows, None, [drawn]).logp, (known.logp + 1e-6).masked_fill(~rows.mask, 0))
    off = Draws(rows.ids[:, 2:], known.logp, known.logp - 1, known.entropy)
    with pytest.raises(RuntimeError, match="disagree about the same policy by 1 nats"):
        scorer(alone).old(net, rows, None, [off])


def test_images_and_router_losses_are_scored_by_trls_pass(alone):
    asked = []

    def trl_pass(model, ids, attention, width, **rest):
        asked.append({"width": width, **rest})
        return torch.zeros(4, 4), torch.ones(4, 4), torch.tensor(0.5)

    mine, rows = scorer(alone, trl_pass), text()
    pixels = torch.zeros(4, 1)
    pictures = Sequences(rows.ids, rows.attention, rows.mask, {"pixel_values": pixels})
    mine.old(None, pictures, 2, [None])
    mine.reference(None, pictures, 2)
    assert mine.current(torch.nn.Linear(1, 1), rows, router_loss=True).router_loss == 0.5
    common = {"width": 4, "pixel_values": pixels, "batch_size": 2}
    assert asked == [
        {**common, "compute_entropy": True},
        {**common, "compute_entropy": False},
        {"width": 4, "batch_size": None, "compute_entropy": True, "compute_aux_loss": True},
    ]


def test_which_policy_a_model_stands_for():
    policy, reference = tiny.model(), tiny.model()
    assert is_reference(reference, reference, reference) and not is_reference(policy, policy, reference)
    lora = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.add_adapter("ref", lora.peft_config["default"])
    assert not is_reference(lora, lora, None)
    for name in (None, "ref"):
        with use_adapter(lora, name):
            assert is_reference(lora, lora, None)
    assert not is_reference(lora, lora, None)
    prompts = get_peft_model(tiny.model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PROMPT_TUNING: take LoRA, or set beta=0"):
        is_reference(prompts, prompts, None)


def test_dynamic_sampling_fills_a_batch_from_further_prompts(alone, args):
    """Groups of odd prompts are never mixed; of the four prompts asked for, two are odd."""
    data = Dataset.from_dict({"i": list(range(32))})
    rounds = []

    def draw(rows):
        i = torch.tensor([row["i"] for row in rows])
        rounds.append(len(rows))
        verdict = torch.where(i % 2 == 0, torch.arange(len(rows)) % 2, 1).float()
        return {"verdict": verdict, "i": i, "completion_mask": torch.ones(len(rows), 3)}

    inputs = [{"i": i} for i in (0, 1, 2, 3) for _ in range(4)]
    made, metrics = DynamicSampling(data, args, alone).rollout(inputs, draw)
    assert len(made["i"]) == 16 and (made["i"] % 2 == 0).all()
    assert made["i"].view(4, 4).unique(dim=1).shape == (4, 1) and made["i"].unique().numel() == 4
    assert metrics["dynamic_sampling/kept"] == 1 and metrics["dynamic_sampling/rounds"] == len(rounds) > 1
    assert metrics["dynamic_sampling/drawn"] == sum(rounds) / 16


@pytest.mark.parametrize(
    ("cut_off", "rounds"),
    [("wrong", 1), ("all", 2)],
    ids=["a wrong answer that is cut off still fails its group", "a group without a token is replaced"],
)
def test_dynamic_sampling_counts_answers_that_are_cut_off(alone, args, cut_off, rounds):
    data, drawn = Dataset.from_dict({"i": list(range(32))}), []

    def draw(rows):
        drawn.append(len(rows))
        i, right = torch.tensor([row["i"] for row in rows]), torch.arange(len(rows)) % 2
        masked = (1 - right).bool() if cut_off == "wrong" else i < 2
        return {
            "verdict": right.float(),
            "i": i,
            "completion_mask": torch.where(masked[:, None], 0, torch.ones(1, 3)),
        }

    inputs = [{"i": i} for i in (0, 1, 2, 3) for _ in range(4)]
    made, metrics = DynamicSampling(data, args, alone).rollout(inputs, draw)
    assert metrics["dynamic_sampling/rounds"] == len(drawn) == rounds
    assert (cut_off == "wrong") == bool((made["i"] < 2).any())


def test_a_micro_batch_is_split_with_its_mask():
    inputs = rollout()
    mask = inputs["completion_mask"].bool()
    (whole,) = passes.split(inputs, mask, 0)
    assert whole[0] is inputs and whole[1] is mask
    parts = passes.split(inputs, mask, 8)
    assert len(parts) > 1
    for part, needed in parts:
        assert torch.equal(part["completion_mask"].bool(), needed)
    assert sum(len(needed) for _, needed in parts) == 8
    assert len(passes.split({**inputs, "pixel_values": torch.zeros(8, 1)}, mask, 8)) == 1


def step_of(tokens: int) -> hapo.TokenBatch:
    mask = torch.ones(1, tokens, dtype=torch.bool)
    x = torch.zeros(1, tokens)
    batch = hapo.TokenBatch(mask=mask, old_logp=x, reward=torch.ones(1), group=torch.zeros(1, dtype=torch.long))
    made = GRPO.prepare(batch).replace(logp=x, entropy=x + 2)
    return made.replace(totals=hapo.StepTotals(2, 2 * tokens, 2 * tokens))


def test_shares_of_a_step_add_up_and_are_logged_once(alone):
    lines = []
    log = MetricLog(alone, lambda name, value: lines.append((name, value)))
    batch = step_of(3)
    for share in (0.25, 0.5):
        log.add(GRPO.loss(batch), batch, [AuxiliaryLoss("mine", 0.1, torch.tensor(share, requires_grad=True))])
    assert lines == []
    log.flush()
    logged = dict(lines)
    assert logged["mine"] == 0.75 and logged["entropy"] == 2 and logged["ratio/mean"] == 1
    log.flush()
    assert len(lines) == len(logged)
    for name in ("entropy", "twice"):
        losses = [AuxiliaryLoss(name, 1.0, torch.tensor(0.0))] * 2
        with pytest.raises(ValueError, match=f"the name '{name}', which is taken"):
            log.add(GRPO.loss(batch), batch, losses)


def test_auxiliary_losses_are_weighted_and_undo_the_mean_over_ranks():
    value = torch.tensor(3.0, requires_grad=True)
    loss = auxiliary.total(torch.tensor(2.0), [AuxiliaryLoss("a", 0.5, value)], ranks=4)
    loss.backward()
    assert loss == 4 * (2 + 0.5 * 3) and value.grad == 4 * 0.5
    assert auxiliary.router_losses(None, 0.1, 8) == []
    assert auxiliary.router_losses(torch.tensor(2.0), 0.1, 8) == [("aux_loss", 0.1, 0.25)]
    with pytest.raises(ValueError, match=r"'a' has shape \(2,\).*divide by batch.totals.tokens"):
        auxiliary.total(torch.tensor(0.0), [AuxiliaryLoss("a", 1.0, torch.zeros(2))], ranks=1)


def test_the_recorder_takes_some_rollouts_and_some_groups(alone, args, tmp_path):
    recorder = Recorder(RunRecords(tmp_path), args, GRPO, lambda rows: ["x"] * len(rows))
    assert [step for step in range(1, 26) if recorder.takes_tokens(step)] == [
        *range(1, 5),
        *range(9, 13),
        *range(21, 25),
    ]
    inputs = prepared(GRPO, alone, one_step=True)
    batch = RolloutRows.of(inputs).batch
    batch = batch.replace(logp=batch.old_logp, entropy=batch.old_entropy)
    recorder.add_tokens(10, inputs, batch, GRPO.loss(batch), None, {})
    recorder.write_tokens(10)
    table = pd.read_parquet(tmp_path / "tokens" / "step-000010-0.parquet")
    assert set(table.response) == {0, 1, 3} and set(table.group) == {0}  # the first group; one row was not judged
    assert set(table.rollout) == {9} and set(table.step) == {10}
    assert table.temperature.tolist() == pytest.approx([0.7] * 6)


def test_a_checkpoint_gives_back_the_state(alone, args, tmp_path):
    inputs = prepared(GRPO, alone)
    parts = split_tensor_dict(inputs, 2)
    rows = step_rows(GRPO, [RolloutRows.of(part) for part in parts], alone, None, None)
    for row, part in zip(rows, parts, strict=True):
        row.put(part)
    stats = hapo.EntropyStats(pivot=-0.1, sigma=1.5, h_max=0.8, h_min=-4.5)
    term = {"coef": 0.2, "last": 1.5}
    state = checkpoint.RunState(
        metrics={"a": [1.0]},
        loss={"total": 2.0},
        stats=stats,
        micro_step=5,
        fresh_prompts=7,
        mixed_share=0.5,
        entropy_term=term,
        rollout=parts,
    )
    layout = checkpoint.layout_of(args, 1)
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    checkpoint.save_state(folder, state, alone, GRPO, layout)
    read = checkpoint.load_state(folder, alone)
    for name in (
        "stats",
        "sampled_with",
        "micro_step",
        "fresh_prompts",
        "mixed_share",
        "metrics",
        "loss",
        "entropy_term",
    ):
        assert getattr(read, name) == getattr(state, name)
    for part, back in zip(parts, read.rollout, strict=True):
        assert back.keys() == without_step(part).keys()
        for name, value in back.items():
            torch.testing.assert_close(value, part[name], rtol=0, atol=0, equal_nan=True)
    assert checkpoint.check_checkpoint(True, tmp_path, GRPO, layout) == str(folder)
    with pytest.raises(ValueError, match="another schedule"):
        checkpoint.check_checkpoint(True, tmp_path, GRPO, {**layout, "processes": 2})


def test_what_is_to_happen_when_training_begins_happens_once():
    done = []
    callback = checkpoint.OnceAtBegin(lambda: done.append(1))
    for _ in range(2):
        callback.on_train_begin(SimpleNamespace())
    assert done == [1]


def logged(trainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


class WithEntropy(HAPOTrainer):
    """With a bonus on the mean entropy of the step."""

    WEIGHT = -0.3

    def auxiliary_losses(self, batch, scored):
        mean = scored.entropy[batch.mask].sum() / max(batch.totals.tokens, 1)
        return [*super().auxiliary_losses(batch, scored), AuxiliaryLoss("entropy_bonus", self.WEIGHT, mean)]


def test_an_auxiliary_loss_is_logged_under_its_name_and_moves_the_gradient():
    """That passes, micro-batches and ranks do not change the gradient is tested with those of the methods."""
    plain, without = fixed_rollout.run(16, 1, 2, 1)
    pulled, trainer = fixed_rollout.run(4, 4, 8, 1, kind=WithEntropy)
    entropies = logged(trainer, "entropy")
    assert logged(trainer, "entropy_bonus") == pytest.approx(entropies, abs=1e-5)
    assert entropies[0] == pytest.approx(logged(without, "entropy")[0], abs=1e-5)
    bonus = WithEntropy.WEIGHT * entropies[0]
    assert logged(trainer, "loss")[0] == pytest.approx(logged(without, "loss")[0] + bonus, abs=1e-5)
    assert any((pulled.steps[0][n] - g).abs().max() > 1e-3 for n, g in plain.steps[0].items())


def test_the_entropy_term_is_the_mean_entropy_and_its_weight_follows_it():
    """H starts near 2.6 nats: below the target from the first step on, so the weight acts from the second."""
    adaptive = {
        "use_adaptive_entropy": True,
        "entropy_coef": 0.3,
        "entropy_coef_delta": 0.1,
        "entropy_coef_max": 0.45,
    }
    _, trainer = fixed_rollout.run(4, 4, 8, 1, **adaptive, entropy_target=10.0, max_steps=3)
    _, without = fixed_rollout.run(4, 4, 8, 1, max_steps=3)
    entropies = logged(trainer, "entropy")
    assert logged(trainer, "entropy_term") == pytest.approx(entropies, abs=1e-5)
    assert logged(trainer, "entropy_coef") == pytest.approx([0.4, 0.45, 0.45])
    losses, plain = logged(trainer, "loss"), logged(without, "loss")
    assert losses[0] == pytest.approx(plain[0], abs=1e-6)
    assert logged(trainer, "policy_loss")[:2] == pytest.approx(plain[:2], abs=1e-5)  # under TRL's names
    assert trainer.entropy_coef == pytest.approx(0.45)
    assert losses[1] == pytest.approx(plain[1] - 0.4 * entropies[1], abs=1e-5)  # step 1 left the same weights
    _, trainer = fixed_rollout.run(4, 4, 8, 1, **adaptive, entropy_target=1.5, max_steps=3)
    assert logged(trainer, "entropy_coef") == pytest.approx([0.2, 0.1, 0.0], abs=1e-12)
    assert logged(trainer, "loss") == pytest.approx(plain, abs=1e-6)


def test_the_entropy_term_is_of_the_tokens_that_learn():
    entropy, keep = torch.tensor([[1.0, 3.0, 9.0]], requires_grad=True), torch.tensor([[True, False, True]])
    mask, zeros = torch.tensor([[True, True, False]]), torch.zeros(1, 3)
    batch = hapo.TokenBatch(mask=mask, old_logp=zeros, reward=torch.zeros(1), group=torch.tensor([0]), keep=keep)
    args = SimpleNamespace(entropy_coef=0.5, use_adaptive_entropy=False)
    name, weight, value = EntropyTerm(args).share(batch.replace(totals=batch.count()), entropy, train=False)
    assert (name, weight, value.item()) == ("entropy_term", -0.5, 1.0)
    value.backward()
    assert entropy.grad.tolist() == [[1.0, 0.0, 0.0]]


def test_the_entropy_of_all_ranks_and_passes_sets_the_next_weight():
    adaptive = {"entropy_coef_min": 0.0, "entropy_coef_max": 1.0, "entropy_coef_delta": 0.1, "entropy_target": 5.0}
    term = EntropyTerm(SimpleNamespace(entropy_coef=0.5, use_adaptive_entropy=True, **adaptive))
    zeros, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    batch = hapo.TokenBatch(mask=mask, old_logp=zeros, reward=torch.zeros(1), group=torch.tensor([0]))
    batch = batch.replace(totals=hapo.StepTotals(4, 4, 4))
    for _ in range(2):
        term.share(batch, torch.tensor([[6.0]]), train=True)
        term.share(batch, torch.tensor([[1e3]]), train=False)  # an evaluation has no say
    assert term.weight == 0.0  # before the first step no entropy is known
    term.end_of_step(lambda mine: 2 * mine)
    assert (term.last, term.coef, term.weight) == (6.0, 0.4, 0.0)
    term.share(batch, torch.tensor([[20.0]]), train=True)
    term.end_of_step(lambda mine: mine)
    assert (term.last, term.coef, term.weight) == (5.0, 0.5, 0.5)


def experts() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tiny.ALPHABET) + 2, "hidden_size": 32, "intermediate_size": 48}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 4}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return MixtralForCausalLM(MixtralConfig(**sizes, **layers, **tokens, max_position_embeddings=64))


def test_the_router_loss_is_the_mean_over_micro_batches():
    _, without = fixed_rollout.run(4, 4, 8, 1, net=experts(), router_aux_loss_coef=0.0, max_steps=1)
    _, trainer = fixed_rollout.run(4, 4, 8, 1, net=experts(), router_aux_loss_coef=0.1, max_steps=1)
    (mean,) = logged(trainer, "aux_loss")
    assert 1 < mean < 4
    assert logged(trainer, "loss")[0] == pytest.approx(logged(without, "loss")[0] + 0.1 * mean, abs=1e-5)
    assert not logged(without, "aux_loss")


class Doubling(Scorer):
    """A current policy that gives every token twice the probability."""

    def current(self, model, rows, router_loss=False):
        logp, entropy, *_ = super().current(model, rows, router_loss)
        return Scored(logp + math.log(2), entropy)


class OtherScorer(HAPOTrainer):
    def make_scorer(self):
        theirs = super().make_scorer()
        return Doubling(theirs.t_base, theirs.autocast, theirs.drawn, theirs.trl_pass)


def test_a_subclass_swaps_the_scorer(tmp_path):
    trainer = tiny.trainer(tmp_path, kind=OtherScorer, max_steps=1)
    trainer.train()
    assert logged(trainer, "ratio/mean") == pytest.approx([2.0], abs=1e-4)


@pytest.mark.parametrize("steps", [4, 1], ids=["TRL asks", "TRL takes every ratio for 1"])
@pytest.mark.filterwarnings("ignore:One optimiser step a rollout batch")
def test_each_rollout_is_scored_once_by_the_old_policy_and_once_by_the_reference(tmp_path, steps):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = tiny.trainer(tmp_path, peft_config=lora, beta=0.1, max_steps=1, steps_per_generation=steps)
    asked = []

    def watched(name, score, *args):
        asked.append((name, scored := score(*args)))
        return scored

    for name in ("old", "reference"):
        setattr(trainer.scorer, name, partial(watched, name, getattr(trainer.scorer, name)))
    trainer.train()
    scores = dict(asked)
    assert sorted(name for name, _ in asked) == ["old", "reference"]
    assert (scores["old"].logp - scores["reference"].logp).abs().max() > 1e-3  # the adapter does something


class Fixed(Sampler):
    """Answers without a model."""

    def draw(self, asked):
        return Turn([[5 + i % 3, 1] for i in range(len(asked.prompt_ids))], [[-1.0, -1.0]] * len(asked.prompt_ids))


class OtherSampler(HAPOTrainer):
    def make_sampler(self):
        return Fixed(self.method.temperature_rule)


def test_a_subclass_swaps_the_sampler(tmp_path):
    trainer = tiny.trainer(tmp_path, kind=OtherSampler, max_steps=1)
    trainer.train()
    assert logged(trainer, "completions/mean_length") == [2.0]
    rows = RolloutRows.of(trainer._buffered_inputs[0]).batch
    assert (rows.sampler_logp == -1).all() and not torch.equal(rows.old_logp, rows.sampler_logp)
