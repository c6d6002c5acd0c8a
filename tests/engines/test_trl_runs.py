"""Whole short runs of the TRL engine: what a user of GRPOTrainer expects to keep working, and what is refused."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import GenerationConfig, TrainerCallback

import hapo
from hapo.engines.trl.auxiliary import AuxiliaryLoss
from hapo.engines.trl.checkpoint import complete_checkpoints
from hapo.engines.trl.finite import NotFiniteError
from hapo.engines.trl.rollout import EpochSampler, FreshPrompts, prompts_to_draw
from hapo.engines.trl.rows import RolloutRows
from hapo.engines.version import require
from hapo.insight.run import Run, recompute
from hapo.parts.penalty import kl_penalty
from hapo.stage import Stage
from hapo.trl import HAPOConfig, HAPOTrainer
from tests.engines import tiny
from tests.two_ranks import SPLIT

ROOT = Path(__file__).parents[2]
CLOCKS = {"step_time", "wall_seconds", "train_runtime", "train_samples_per_second", "train_steps_per_second"} | {
    f"time/{phase}" for phase in ("generate", "reward", "score", "update")
}


def metrics(run: Path) -> list[dict]:
    file = run / "metrics.jsonl" if run.is_dir() else run
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def batches(trainer) -> list[hapo.TokenBatch]:
    """The micro-batches of the last rollout batch."""
    return [RolloutRows.of(inputs).batch for inputs in trainer._buffered_inputs]


class Dies(TrainerCallback):
    """Ends a run in the middle of its step 7, in this process."""

    def on_substep_end(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= 7:
            raise KeyboardInterrupt


def kill(folder: Path, options: dict) -> None:
    """Run in a process of its own, which gets SIGKILL after step 7."""
    killed = subprocess.run(
        [sys.executable, "-m", "tests.engines.killed_run", str(folder), "7", json.dumps(options)],
        cwd=ROOT,
        env={**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -9, killed.stderr[-2000:]


@pytest.mark.parametrize(
    ("options", "how"),
    [
        (
            {
                "save_steps": 4,
                "max_num_gen_batches": 3,
                "draw_ahead": True,
                "num_iterations": 2,
                "whole_groups": True,
                "steps_per_generation": 2,
            },
            "killed",
        ),
        (
            {"save_steps": 3, "gradient_accumulation_steps": 2, "steps_per_generation": 8, "logging_steps": 2},
            "raised",
        ),
        ({"save_steps": 5, "max_steps": 11, "generation_batch_size": 224, "logging_steps": 1}, "raised"),
        (
            {
                "save_steps": 3,
                "method": "dapo",
                "method_options": {"multi_objective_aggregation": "normalize_then_sum"},
                "reward_weights": [1.0, 0.5],
                "use_adaptive_entropy": True,
                "entropy_target": 10.0,
                "steps_per_generation": 4,
            },
            "raised",
        ),
        (
            {
                "save_steps": 3,
                "method": "egspo",
                "demonstrations": SPLIT["hybrid"]["demonstrations"],
                "demonstration_weight": {"0": 0.5, "8": 0.0},
                "demonstration_method": "chord_phi",
            },
            "killed",
        ),
    ],
    ids=["dynamic-sampling", "inside-a-rollout", "second-epoch", "several-rewards", "demonstrations"],
)
def test_kill_and_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path, options, how):
    options = {"max_steps": 9, "save_strategy": "steps", "run_records": True, "record_tokens_every": 2, **options}
    if "generation_batch_size" in options:
        options["steps_per_generation"] = None
    reward = "half_mixed" if "max_num_gen_batches" in options else "count_digits"
    if how == "killed":
        kill(tmp_path / "b", {**options, "reward": reward})
    options["reward"] = getattr(tiny, reward)
    if "reward_weights" in options:
        options["reward"] = [tiny.count_digits, tiny.half_mixed]
    if how == "raised":
        dying = tiny.trainer(tmp_path / "b", **options)
        dying.add_callback(Dies())
        with pytest.raises(KeyboardInterrupt):
            dying.train()
    uninterrupted = tiny.trainer(tmp_path / "a", **options)
    uninterrupted.train()
    resumed = tiny.trainer(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=True)
    for name, value in weights(uninterrupted).items():
        assert torch.equal(value, weights(resumed)[name]), name
    assert resumed.temperature_stats == uninterrupted.temperature_stats
    a, b = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert [line["step"] for line in a] == [line["step"] for line in b]
    assert a == b
    for file in (tmp_path / "a" / "tokens").iterdir():
        twin = pd.read_parquet(tmp_path / "b" / "tokens" / file.name)
        pd.testing.assert_frame_equal(pd.read_parquet(file), twin)


def test_adaptive_temperature_waits_for_statistics_and_is_recorded(tmp_path):
    trainer = tiny.trainer(
        tmp_path,
        max_steps=8,
        run_records=True,
        record_tokens_every=1,
        method_options={"temperature": {"tau": 0.5}},
        temperature=0.7,
    )
    trainer.train()
    first = pd.read_parquet(tmp_path / "tokens" / "step-000001-0.parquet")
    assert (first["temperature"] == first["temperature"].iloc[0]).all()
    assert first["temperature"].iloc[0] == pytest.approx(0.7)
    assert (first["logp_old"] - first["logp_sampler"]).abs().max() < 1e-4
    later = pd.read_parquet(tmp_path / "tokens" / "step-000005-0.parquet")
    assert later["temperature"].between(0.7 * 0.5 - 1e-6, 0.7 * 1.5 + 1e-6).all()
    assert later["temperature"].std() > 0.005
    assert (later["logp_old"] - later["logp_sampler"]).abs().max() > 0.05
    later = later[later["signal"].notna()]  # of groups that count
    capped = (
        (later["logp_old"] - later["logp_sampler"]).clip(-20, 20).map(lambda x: min(2.718281828459045**x, 2.0))
    )
    assert (later["weight"] - capped).abs().max() < 1e-4
    clipped = ((later.ratio > 1 + later.bound_high) & (later.advantage_used > 0)) | (
        (later.ratio < 1 - later.bound_low) & (later.advantage_used < 0)
    )
    assert (clipped == later["clipped"]).all()


def test_records_can_be_read_without_the_library(tmp_path):
    trainer = tiny.trainer(tmp_path, run_records=True, save_strategy="steps", save_steps=2)
    trainer.train()
    assert {p.name for p in tmp_path.iterdir()} >= {"config.yaml", "manifest.json", "metrics.jsonl", "tokens"}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["seed"] == 7
    assert len(manifest["weights_sha256"]) == 64
    assert manifest["versions"]["trl"].startswith("1.16")
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-4"}
    tokens = pd.read_parquet(tmp_path / "tokens")
    assert set(tokens["step"]) == {1, 2, 3, 4}  # the whole rollout batch
    assert {"prompt", "text", "entropy", "signal", "ratio", "reward", "group", "clipped"} <= set(tokens.columns)
    one = tokens[tokens["response"] == 0].sort_values("position")
    assert one["position"].tolist() == list(range(len(one)))


def test_lora(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = tiny.trainer(tmp_path, peft_config=lora, method="hapo", beta=0.05, max_steps=5)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    assert all("lora_" in n for n in changed)
    assert trainer.state.log_history[1]["kl"] > 0
    assert any("temperature/mean" in line for line in trainer.state.log_history)


def test_reference_kl_pulls_towards_the_reference(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    kl = {}
    for beta in (0.01, 5.0):
        trainer = tiny.trainer(
            tmp_path / str(beta), str(tmp_path / "model"), method="grpo", beta=beta, max_steps=6
        )
        trainer.train()
        lines = [line for line in trainer.state.log_history if "kl" in line]
        assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)
        kl[beta] = lines[-1]["kl"]
    assert 0 < kl[5.0] < kl[0.01]


def test_dynamic_sampling_replaces_groups_of_equal_rewards(tmp_path):
    """Odd prompts always earn the same; the first batch has some, the batch trained on has none."""

    def reward(completions, i, **_):
        return [1.0 if k % 2 else float(len(c) % 2) for c, k in zip(completions, i, strict=True)]

    trainer = tiny.trainer(tmp_path, reward=reward, max_num_gen_batches=10, max_steps=4)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["dynamic_sampling/rounds"] > 1
    assert line["dynamic_sampling/kept"] == 1.0
    assert line["groups/used"] == 1.0
    used = torch.cat([b.group for b in batches(trainer)])
    assert used.unique(return_counts=True)[1].tolist() == [4] * 8
    assert all(b.mask.any(1).all() for b in batches(trainer))


def test_drawing_ahead_needs_fewer_rounds_for_the_same(tmp_path):
    """Odd prompts always earn the same, so that half of the groups are mixed."""

    def reward(completions, i, **_):
        return [1.0 if k % 2 else float(n % 4) for n, k in enumerate(i)]

    lines = []
    for ahead in (False, True):
        options = {"max_num_gen_batches": 10, "draw_ahead": ahead, "max_steps": 24, "logging_steps": 4}
        trainer = tiny.trainer(tmp_path / str(ahead), reward=reward, **options)
        trainer.train()
        lines.append([line for line in trainer.state.log_history if "dynamic_sampling/rounds" in line])
        used = torch.cat([b.group for b in batches(trainer)])
        assert used.unique(return_counts=True)[1].tolist() == [4] * 8
    assert all(line["dynamic_sampling/kept"] == line["groups/used"] == 1 for of in lines for line in of)
    without, ahead = ([line["dynamic_sampling/rounds"] for line in of[1:]] for of in lines)
    assert min(without) >= 2
    assert sum(ahead) < sum(without) / 1.5
    assert max(line["dynamic_sampling/drawn"] for line in lines[1]) > 2


@pytest.mark.parametrize(
    ("groups", "share", "unit", "expected"),
    [(16, 1.0, 1, 16), (16, 0.75, 1, 24), (3, 0.5, 4, 12), (1, 0.1, 1, 20)],
)
def test_prompts_to_draw(groups, share, unit, expected):
    assert prompts_to_draw(groups, share, unit) == expected


def test_dynamic_sampling_gives_up_at_its_limit_and_says_so(tmp_path, caplog):
    trainer = tiny.trainer(
        tmp_path, reward=lambda completions, **_: [1.0] * len(completions), max_num_gen_batches=3
    )
    before = weights(trainer)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["dynamic_sampling/kept"] == 0
    assert line["loss"] == 0
    assert caplog.text.count("dynamic sampling ended after 3 rounds (max_num_gen_batches) with 0 of 8 groups") == 1
    assert all(torch.equal(before[n], w) for n, w in weights(trainer).items())


def test_rows_that_are_equal_are_drawn_as_often_as_they_stand_in_the_data():
    """An environment may own all prompts; without further rows the order runs dry."""
    rows = Dataset.from_dict({"prompt": ["a"] * 5 + ["b", "c"]})
    used = Counter({json.dumps({"prompt": "a"}): 1, json.dumps({"prompt": "b"}): 1})
    taken = FreshPrompts(rows, seed=0).take(9, used)
    assert [row["prompt"] for row in taken] == ["c", "a", "a", "a", "a"]


def test_a_sampler_far_from_the_policy_is_said_once_with_its_cause(tmp_path, caplog):
    trainer = tiny.trainer(tmp_path, top_k=1, sampling_support=False, max_steps=2, method="grpo", beta=0.0)
    trainer.train()
    assert trainer.state.log_history[0]["sampler_weight/mean"] < 0.5
    assert caplog.text.count("the mean importance weight of sampled tokens is 0.") == 1
    assert "than the trained policy (top_k=1)" in caplog.text


def test_unscorable_and_truncated_responses_are_in_no_count(tmp_path):
    def reward(completions, **_):
        return [None if i % 4 == 0 else float(i % 2) for i, _ in enumerate(completions)]

    trainer = tiny.trainer(
        tmp_path,
        reward=reward,
        mask_truncated_completions=True,
        max_steps=1,
        method_options={"filter_groups": False},
    )
    trainer.train()
    totals = batches(trainer)[0].totals
    rows = [b.mask.any(1) for b in batches(trainer)]
    scored = [~b.verdict.isnan() for b in batches(trainer)]
    whole = [b["completion_mask"].any(1) for b in trainer._buffered_inputs]
    assert totals.sequences == rows[0].sum()
    for r, s, w in zip(rows, scored, whole, strict=True):
        assert torch.equal(r, s & w)


def test_a_masked_response_still_counts_in_its_group(tmp_path):
    """Right answers end, wrong ones are cut off: without the masked rows every group would have equal rewards."""

    def rollout(prompts, trainer):
        rows = range(len(prompts))
        return {
            "prompt_ids": [tiny.tokenizer()(p)["input_ids"] for p in prompts],
            "completion_ids": [[5 + i % 3, 1] if i % 2 else [5 + i % 3] * 8 for i in rows],
            "logprobs": [[-2.0] * (2 if i % 2 else 8) for i in rows],
        }

    def reward(completions, **_):
        return [float(i % 2) for i, _ in enumerate(completions)]

    trainer = tiny.trainer(
        tmp_path,
        method="grpo",
        beta=0.0,
        reward=reward,
        rollout_func=rollout,
        mask_truncated_completions=True,
        max_steps=4,
        run_records=True,
    )
    before = weights(trainer)
    trainer.train()
    rows = torch.cat([b.mask.any(1) for b in batches(trainer)])
    advantage = torch.cat([b.advantage[:, 0] for b in batches(trainer)])
    assert rows.float().mean() == 0.5
    torch.testing.assert_close(advantage[rows], torch.full((16,), 0.866024), atol=1e-5, rtol=0)
    assert not advantage[~rows].any()
    assert any(not torch.equal(before[n], w) for n, w in weights(trainer).items())

    # The records have their rewards, so that what is made of the records is what training made.
    run = Run(tmp_path)
    recorded = run.rollout(1)
    assert recorded.complete
    assert (len(recorded.batch), len(recorded.without_tokens)) == (rows.sum(), (~rows).sum())
    assert (recorded.without_tokens.reward == 0).all()
    np.testing.assert_allclose(recompute(recorded, run.method()).advantage, run.tokens(1).advantage, atol=1e-6)


def test_overlong_punishment_shapes_the_reward_not_the_verdict(tmp_path):
    trainer = tiny.trainer(tmp_path, overlong_buffer=4, max_steps=1)
    trainer.train()
    b = batches(trainer)[0]
    n = trainer._buffered_inputs[0]["completion_mask"].sum(1)
    torch.testing.assert_close(b.reward, b.verdict - ((n - 4) / 4).clamp(0, 1))
    assert (b.reward < b.verdict).any()


def test_evaluation_completion_logs_and_continuous_batching(tmp_path, capsys):
    net = tiny.model()
    trainer = HAPOTrainer(
        net,
        tiny.count_digits,
        tiny.config(
            tmp_path,
            max_steps=5,
            eval_strategy="steps",
            eval_steps=5,
            per_device_eval_batch_size=8,
            log_completions=True,
            num_completions_to_print=1,
            use_transformers_continuous_batching=True,
            transformers_continuous_batching_config={"num_blocks": 64, "page_size": 16},
        ),
        train_dataset=tiny.data(),
        eval_dataset=tiny.data(8),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    evaluations = [line for line in trainer.state.log_history if "eval_reward" in line]
    assert len(evaluations) == 1
    assert any("temperature/mean" in line for line in trainer.state.log_history)
    assert (tmp_path / "completions" / "completions_00005.parquet").is_file()


def test_beta_is_the_method_s_own_unless_it_is_set(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    saved = str(tmp_path / "model")
    for method, beta in (("archer", 0.001), ("grpo", 0.04), ("dapo", 0.0)):
        assert tiny.trainer(tmp_path, saved, method=method).beta == beta
    assert tiny.trainer(tmp_path, method="grpo", beta=0.0).ref_model is None
    with pytest.raises(ValueError, match=r"beta=0.04 needs a reference model"):
        tiny.trainer(tmp_path, method="grpo")
    with pytest.raises(ValueError, match="TRL loads a reference model only with beta > 0"):
        tiny.trainer(tmp_path, method="archer", beta=0.0, method_options={"kl_reasoning": 0.1})
    with pytest.raises(ValueError, match=r"beta=0.0 and the method's kl_coef=0.04 disagree"):
        tiny.trainer(tmp_path, method_object=hapo.method("grpo"), beta=0.0)


def test_a_choice_of_tokens_of_the_user_sees_what_prepare_made(tmp_path):
    seen = []

    def keep(batch):
        seen.append((batch.weight, batch.sampler_logp, batch.verdict))
        return batch.weight < 1.5

    mine = hapo.method("dapo", filter_groups=False).replace(name="mine", select=keep)
    trainer = tiny.trainer(tmp_path, method_object=mine, method="dapo", gradient_accumulation_steps=2, max_steps=2)
    trainer.train()
    assert len(seen) >= 1
    assert 0 < trainer.state.log_history[-2]["kept"] <= 1
    with pytest.raises(TypeError, match="a name goes into HAPOConfig"):
        tiny.trainer(tmp_path, method_object="dapo")


def test_a_replaced_penalty_trains(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    mine = hapo.method("dapo").replace(
        name="mine", penalty=Stage(kl_penalty, "logp", "ref_logp", "mask", coef=0.1)
    )
    trainer = tiny.trainer(tmp_path / "run", str(tmp_path / "model"), method_object=mine, max_steps=2)
    trainer.train()
    assert trainer.beta == 0.1
    assert "kl" in trainer.state.log_history[0]


def test_any_method_object_trains(tmp_path):
    from hapo.parts.advantage import group_advantage

    mine = hapo.Method(name="mine", advantage=lambda b: group_advantage(b.reward, b.group, b.mask))
    trainer = tiny.trainer(tmp_path, method_object=mine, max_steps=2)
    trainer.train()
    assert trainer.method is mine
    assert "temperature/mean" not in trainer.state.log_history[-2]


def test_one_update_a_rollout_warns_that_clipping_is_idle(tmp_path):
    with pytest.warns(UserWarning, match="every importance ratio is 1"):
        config = tiny.config(tmp_path, steps_per_generation=1)
    trainer = HAPOTrainer(
        tiny.model(), tiny.count_digits, config, train_dataset=tiny.data(), processing_class=tiny.tokenizer()
    )
    trainer.train()
    ratios = [line["ratio/mean"] for line in trainer.state.log_history if "ratio/mean" in line]
    assert ratios
    assert ratios == pytest.approx([1] * len(ratios), abs=1e-6)


def test_the_order_of_an_epoch_does_not_depend_on_the_epochs_before():
    state = SimpleNamespace(epoch=0.0)

    def sampler() -> EpochSampler:
        repeats = {"mini_repeat_count": 2, "batch_size": 4, "repeat_count": 1}
        return EpochSampler(data_source=range(8), seed=3, shuffle=True, trainer_state=lambda: state, **repeats)

    whole = sampler()
    first = list(whole)
    state.epoch = 1.0
    second = list(whole)
    assert second == list(sampler())
    assert first != second


def test_the_default_schedule_takes_four_updates(tmp_path):
    config = tiny.config(tmp_path, steps_per_generation=None, gradient_accumulation_steps=3)
    assert config.updates_per_rollout == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "grpo"}, "loss_type='grpo' cannot be honoured: .* choose method=\"grpo\""),
        ({"loss_type": "dapo", "method": "grpo"}, "in grpo it is 'grpo'; choose method=\"dapo\""),
        *(
            ({"loss_type": theirs}, f'method="{ours}"')
            for theirs, ours in {"cispo": "cispo", "sapo": "sapo", "dr_grpo": "dr_grpo", "bnpo": "dapo"}.items()
        ),
        ({"importance_sampling_level": "sequence", "loss_type": "luspo"}, 'method="luspo"'),
        ({"importance_sampling_level": "sequence"}, 'method="gspo" or "luspo"'),
        ({"delta": 2.5}, 'method_options={"dual_clip": 2.5}'),
        ({"vespo_k_pos": 1.0}, 'choose method="vespo", method_options'),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation"),
        ({"epsilon": 0.2, "method_options": {"eps_low": 0.1}}, "epsilon=0.2 .* in hapo it is 0.1"),
        ({"sapo_temperature_pos": 1.0}, 'method="sapo"'),
        ({"off_policy_mask_threshold": 0.5}, 'set method_options={"off_policy_mask_threshold"'),
        ({"use_bias_correction_kl": True, "method_options": {"unbiased_kl": False}}, "disagree"),
        ({"epsilon": 0.3}, 'set method_options={"eps_low"'),
        ({"scale_rewards": "batch"}, "scale_rewards='batch'"),
        ({"top_entropy_quantile": 0.2}, 'choose method="forking_tokens"'),
        ({"vllm_importance_sampling_mode": "sequence_mask"}, "per token, truncated"),
        ({"vllm_importance_sampling_correction": False}, "sampler_cap"),
        ({"vllm_importance_sampling_clip_max": 5.0}, "sampler_cap"),
        ({"method": "hapo2"}, "did you mean 'hapo'"),
        ({"method_options": {"eps_hihg": 0.3}}, "did you mean 'eps_high'"),
        ({"method_options": {"temperature": {"tau": 1.0}}}, "tau must be in"),
        ({"method_options": {"kl_coef": 0.1}}, "TRL's beta"),
        ({"method_options": "[1]"}, "method_options"),
        ({"gradient_accumulation_steps": 3}, "must be a multiple of"),
        (
            {"whole_groups": True, "per_device_train_batch_size": 6},
            "the 6 answers of an optimiser step .* are no whole groups of num_generations=4: make them a multiple",
        ),
        ({"max_num_gen_batches": 0}, "max_num_gen_batches must be at least 1"),
        ({"overlong_buffer": 9}, "must not exceed max_completion_length"),
        ({"overlong_buffer": 4, "mask_truncated_completions": True}, "choose one, overlong_buffer=0"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(tmp_path, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dapo", "loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "scale_rewards": "group"},
        {"method": "grpo", "loss_type": "grpo", "importance_sampling_level": "token", "scale_rewards": True},
        {"method": "gspo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        {"method": "dr_grpo", "scale_rewards": False, "loss_type": "dr_grpo"},
        {"method": "forking_tokens", "top_entropy_quantile": 0.2, "cast_lm_head_to_fp32": True},
        {"method": "sapo", "sapo_temperature_neg": 1.05, "vllm_importance_sampling_clip_max": 2.0},
    ],
    ids=lambda options: options["method"],
)
def test_what_the_method_does_may_be_asked_for(tmp_path, options):
    config = tiny.config(tmp_path, **options)
    assert config.asked.keys() == options.keys() - {"method", "cast_lm_head_to_fp32"}
    assert (config.filled_in().loss_type, config.filled_in().top_entropy_quantile) != (None, None)
    assert tiny.config(tmp_path).loss_type is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"do_sample": False}, "is greedy, and all answers of a group are equal"),
        ({"temperature": 0.5}, "set the option temperature, which scoring reads too"),
        ({"num_return_sequences": 2}, "set the option num_generations"),
        ({"max_new_tokens": 4}, "set the option max_completion_length"),
        ({"num_beams": 2}, "is beam sample, and policies are sampled"),
        ({"prompt_lookup_num_tokens": 2}, "is assisted generation, and policies are sampled"),
        ({"output_scores": True}, "rollouts are token ids"),
        ({"min_pp": 0.1}, "generation_kwargs has no option 'min_pp'; did you mean 'min_p'"),
    ],
)
def test_generation_that_is_no_plain_sampling_is_refused_before_any_work(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, generation_kwargs=given)


def test_greedy_rollouts_are_refused_and_penalties_are_not(tmp_path):
    with pytest.raises(ValueError, match="temperature=0.0: it must be above 0"):
        tiny.trainer(tmp_path, temperature=0.0)
    tiny.trainer(tmp_path, generation_kwargs={"repetition_penalty": 1.2, "min_p": 0.01}, max_steps=1).train()


def test_the_penalty_is_weighed_by_the_ratio_where_it_is_asked_for(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    options = {"method": "grpo", "beta": 0.1, "max_steps": 1}
    saved = str(tmp_path / "model")
    for asked in (False, True):
        trainer = tiny.trainer(tmp_path, saved, use_bias_correction_kl=asked, **options)
        assert trainer.method.options["unbiased_kl"] is asked
        assert ("unbiased" in trainer.method.stages["penalty"]) is asked


def test_vllm_with_a_temperature_of_the_user_is_refused(tmp_path):
    """Requests carry numbers: a rule of `TemperatureOptions` goes, a function does not."""
    mine = hapo.method("hapo").replace(temperature_rule=lambda entropy, stats: 1.0 + entropy)
    with pytest.raises(ValueError, match="by a function of its own"):
        tiny.trainer(tmp_path, use_vllm=True, method_object=mine)


def test_dynamic_sampling_from_a_stream_is_refused(tmp_path):
    stream = tiny.data().to_iterable_dataset()
    with pytest.raises(ValueError, match="map-style"):
        HAPOTrainer(
            tiny.model(),
            tiny.count_digits,
            tiny.config(tmp_path, max_num_gen_batches=2),
            train_dataset=stream,
            processing_class=tiny.tokenizer(),
        )


def test_trl_config_is_refused_with_the_remedy(tmp_path):
    from trl import GRPOConfig

    with pytest.raises(TypeError, match="from hapo.trl import HAPOConfig"):
        HAPOTrainer(
            tiny.model(),
            tiny.count_digits,
            GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False),
            train_dataset=tiny.data(),
            processing_class=tiny.tokenizer(),
        )


@pytest.mark.parametrize("found", ["1.15.2", "1.17.0", "2.0.0"])
def test_another_trl_is_refused(monkeypatch, found):
    monkeypatch.setattr(metadata, "version", lambda _: found)
    monkeypatch.setattr("hapo.engines.version.version", lambda _: found)
    with pytest.raises(ImportError, match=rf"tested with trl 1.16 and refuses {found}.*pip install"):
        require("trl")


def test_a_missing_trl_is_named(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("hapo.engines.version.version", missing)
    with pytest.raises(ImportError, match="trl 1.16, which is not installed"):
        require("trl")


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    tiny.trainer(tmp_path, method="hapo", save_strategy="steps", save_steps=2, max_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"another method .*method: 'hapo' there, 'dapo' here"):
        tiny.trainer(tmp_path, method="dapo").train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"'tau': 0.1.* there, .*'tau': 0.2.* here"):
        tiny.trainer(tmp_path, method_options={"temperature": {"tau": 0.2}}).train(
            resume_from_checkpoint=checkpoint
        )


def test_a_checkpoint_that_was_cut_short_is_refused(tmp_path):
    tiny.trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    (tmp_path / "checkpoint-2" / "hapo_state.json").unlink()
    with pytest.raises(ValueError, match="cut short"):
        tiny.trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="no complete checkpoint"):
        tiny.trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_run_folder_that_exists_is_refused(tmp_path):
    tiny.trainer(tmp_path, run_records=True, max_steps=1).train()
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(FileExistsError, match="choose another output_dir"):
        tiny.trainer(tmp_path, run_records=True, max_steps=1).train()
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_run_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written to"):
        tiny.trainer(tmp_path / "file" / "run", run_records=True)


def test_a_full_disk_is_refused_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="GiB left and the run needs about"):
        tiny.trainer(tmp_path, run_records=True)


def test_images_are_refused_by_dynamic_sampling_only(tmp_path):
    trainer = tiny.trainer(tmp_path, max_num_gen_batches=2)
    with pytest.raises(ValueError, match="max_num_gen_batches=1"):
        trainer._dynamic.rollout([], lambda inputs: {"num_images": [1]})


def test_config_survives_the_command_line(tmp_path):
    from transformers import HfArgumentParser

    line = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--activation_checkpointing=0"]
    options = ["--method", "dapo", "--method_options", '{"eps_high": 0.3}']
    (config,) = HfArgumentParser(HAPOConfig).parse_args_into_dataclasses(line + options)
    assert config.method_options == {"eps_high": 0.3}


def test_a_model_whose_logits_scoring_does_not_reproduce_is_refused(tmp_path):
    net = tiny.model()
    forward = net.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 0.3  # a transform that no config names
        return out

    net.forward = scaled
    with pytest.raises(RuntimeError, match="generation and scoring disagree"):
        tiny.trainer(tmp_path, net, max_steps=1).train()


def test_the_model_card_of_a_script_loads_its_last_checkpoint_and_cites_the_paper(tmp_path, monkeypatch):
    tiny.trainer(tmp_path, method="dapo", max_steps=2, save_strategy="steps", save_steps=1).train()
    card = ModelCard.load(tmp_path / "README.md")
    assert "dapo" in card.data.tags
    assert "2503.14476" in card.text
    assert "| rewards | `count_digits` |" in card.text
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert "checkpoint-2" in snippet
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})


@pytest.mark.xdist_group("two_ranks")
def test_two_ranks_sample_dynamically_record_and_resume_inside_a_rollout(two_ranks):
    """What the run used is checked in two_ranks.py."""
    run = two_ranks / "run"
    names = {p.name for p in (run / "checkpoints/checkpoint-1").iterdir()}
    assert names >= {"hapo_state.json", "hapo_rollout-0.safetensors", "hapo_rollout-1.safetensors"}
    first, resumed = (
        [line for line in metrics(file) if "loss" in line] for file in (two_ranks / "first.jsonl", run)
    )
    assert len(first) == 3
    assert first == resumed
    assert {p.name for p in (run / "tokens").iterdir()} >= {f"step-000002-{rank}.parquet" for rank in (0, 1)}


def test_records_of_many_micro_batches_some_of_them_without_a_token(tmp_path):
    """Prompts 3 of 4 always earn the same: whole micro-batches are filtered; the limit of rows falls inside a step."""

    def reward(completions, i, **_):
        return [float(len(c) % 2) if k % 4 == 0 else 1.0 for c, k in zip(completions, i, strict=True)]

    trainer = tiny.trainer(
        tmp_path,
        reward=reward,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        steps_per_generation=32,
        run_records=True,
        record_tokens_every=1,
        record_tokens_rows=6,
    )
    trainer.train()
    tokens = pd.read_parquet(tmp_path / "tokens")
    assert (tokens.groupby("step")["response"].nunique() <= 6).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 1 there, 2 here"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size: 8 there, 4 here"),
        ({"num_iterations": 2}, "num_iterations: 1 there, 2 here"),
    ],
)
def test_a_checkpoint_of_another_schedule_is_refused(tmp_path, options, message):
    tiny.trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    with pytest.raises(ValueError, match=f"under another schedule .*{message}"):
        tiny.trainer(tmp_path, **options).train(resume_from_checkpoint=True)


def test_the_last_complete_checkpoint_stays_until_the_next_is_complete(tmp_path, monkeypatch):
    trainer = tiny.trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)
    save = trainer._save_optimizer_and_scheduler

    def dies_at_the_second(folder):
        if trainer.state.global_step == 4:
            raise KeyboardInterrupt
        save(folder)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again = tiny.trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-4"}


def test_a_rollout_function_cannot_have_adaptive_temperature(tmp_path):
    with pytest.raises(ValueError, match="a rollout_func samples by itself"):
        tiny.trainer(tmp_path, rollout_func=lambda prompts, trainer: {})


def test_a_data_set_smaller_than_a_rollout_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="6 training prompts do not fill one rollout batch of 8"):
        HAPOTrainer(
            tiny.model(),
            tiny.count_digits,
            tiny.config(tmp_path),
            train_dataset=tiny.data(6),
            processing_class=tiny.tokenizer(),
        )


def test_dropout_is_no_disagreement_of_generation_and_scoring(tmp_path):
    trainer = tiny.trainer(tmp_path, tiny.model(attention_dropout=0.3), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["sampling/sampling_logp_difference/mean"] > 0.1


def test_dynamic_sampling_tells_problems_apart_by_all_their_columns(tmp_path):
    rows = [{"prompt": "1+1=", "i": i} for i in range(64)]
    trainer = HAPOTrainer(
        tiny.model(),
        lambda completions, i, **_: [
            1.0 if k % 2 else float(len(c) % 2) for c, k in zip(completions, i, strict=True)
        ],
        tiny.config(tmp_path, max_num_gen_batches=10, max_steps=1),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    assert trainer.state.log_history[0]["dynamic_sampling/kept"] == 1


def test_the_callers_config_stays_as_it_is(tmp_path):
    config = tiny.config(tmp_path)
    HAPOTrainer(
        tiny.model(),
        tiny.count_digits,
        config,
        train_dataset=tiny.data(),
        processing_class=tiny.tokenizer(),
        method=hapo.method("hapo", kl_coef=0.0, temperature={"tau": 0.2}),
    )
    assert config.method_options is None
    assert config.beta is None


@pytest.mark.parametrize("continuous", [False, True])
def test_what_the_model_s_own_generation_config_asks_for_does_not_act(tmp_path, continuous):
    """Rollouts are drawn from the policy; what the file asked for is said, and is in the saved model still."""
    asked = {"typical_p": 0.2, "min_p": 0.5, "repetition_penalty": 2.0}
    options = {"use_transformers_continuous_batching": continuous, "max_steps": 1, "method": "grpo", "beta": 0.0}
    options["transformers_continuous_batching_config"] = {"num_blocks": 64, "page_size": 16}
    net = tiny.model()
    net.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, do_sample=True, **asked)
    with pytest.warns(UserWarning, match="asks for .*typical_p=0.2.* only what you set acts"):
        trainer = tiny.trainer(tmp_path / "asked", net, **options)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["sampler_weight/mean"] == pytest.approx(1.0, abs=1e-4)
    if not continuous:  # whose rows take seconds to begin
        plain = tiny.trainer(tmp_path / "plain", **options)
        plain.train()
        assert line["loss"] == plain.state.log_history[0]["loss"]
    trainer.save_model(tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").typical_p == 0.2


def masked_vocabulary(dtype):
    """A Llama whose output layer is padded: three tokens that it never gives, by a bias of -inf."""
    net = tiny.model()
    head = torch.nn.Linear(net.lm_head.in_features, net.lm_head.out_features)
    with torch.no_grad():
        head.weight.copy_(net.lm_head.weight)
        head.bias.zero_()
        head.bias[-3:] = -torch.inf
    net.lm_head = head
    return net.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["hapo", "forking_tokens"])
def test_a_masked_vocabulary_trains(tmp_path, method, dtype):
    net = masked_vocabulary(dtype)
    trainer = tiny.trainer(tmp_path, net, method=method, save_strategy="steps", save_steps=4, learning_rate=1e-3)
    before = weights(trainer)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert all(math.isfinite(line[name]) for line in lines for name in ("loss", "grad_norm", "entropy"))
    assert any(line["grad_norm"] > 0 for line in lines)
    after = weights(trainer)
    assert all(not w.isnan().any() for w in after.values())
    assert any(not torch.equal(before[n], w) for n, w in after.items())


def test_training_stops_before_a_number_that_is_not_finite_reaches_the_weights(tmp_path):
    """The gradient of step 3 is NaN: its weights stay, and so does the checkpoint of step 2."""

    class Poisoned(HAPOTrainer):
        def auxiliary_losses(self, batch, scored):
            bad = torch.nan if self.state.global_step == 2 else 0.0
            return [AuxiliaryLoss("poison", 1.0, bad * scored.logp.sum())]

    trainer = tiny.trainer(tmp_path, kind=Poisoned, save_strategy="steps", save_steps=1)
    with pytest.raises(NotFiniteError, match=r"the loss is nan at optimiser step 3, .* last checkpoint is whole"):
        trainer.train()
    assert [path.name for path in complete_checkpoints(tmp_path)][-1] == "checkpoint-2"
    assert all(w.isfinite().all() for w in weights(trainer).values())
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"lm_head.weight holds NaN or infinity after optimiser step 2"):
        trainer.save_model(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
