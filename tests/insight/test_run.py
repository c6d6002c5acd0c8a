"""A run folder read back: what any method makes of the recorded tokens is what training made of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import hapo
from hapo.insight.run import Run, parse_arm, parse_method, recompute
from tests.engines import tiny

MADE = ("advantage", "advantage_used", "ratio", "bound_low", "bound_high", "clipped", "kept", "signal", "weight")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Two rollout batches of a real trainer, each used twice, in micro-batches."""
    folder = tmp_path_factory.mktemp("run")
    tiny.trainer(
        folder,
        max_steps=8,
        num_iterations=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        run_records=True,
        record_tokens_every=1,
    ).train()
    return Run(folder)


def test_the_method_recomputed_is_the_method_recorded(run):
    assert run.rollouts == [1, 5]
    for first in run.rollouts:
        rollout, table = run.rollout(first), run.tokens(first)
        again = recompute(rollout, run.method())
        assert rollout.complete
        place = ["response", "step", "position"]
        pd.testing.assert_frame_equal(again[place], table[place], check_dtype=False)
        for name in MADE:
            np.testing.assert_allclose(again[name].astype(float), table[name].astype(float), atol=1e-6)
        assert table.groupby("response")["step"].nunique().eq(2).all()
    assert (table["ratio"] - 1).abs().max() > 1e-3


def test_push_is_minus_the_gradient_times_the_tokens_of_the_step(run):
    rollout = run.rollout(1)
    table = recompute(rollout, hapo.method("dapo", filter_groups=False))
    moved = table[~table.clipped]
    np.testing.assert_allclose(moved.push, moved.ratio * moved.advantage_used * moved.weight, rtol=1e-4, atol=1e-6)
    assert (table[table.clipped].push == 0).all()


def test_another_method_sees_the_same_tokens(run):
    table = run.tokens(1)
    other = recompute(run.rollout(1), parse_method("grpo:kl_coef=0.0"))
    assert other[["response", "step", "position"]].equals(table[["response", "step", "position"]].astype("int64"))
    assert not np.allclose(other.advantage_used, table.advantage_used)


def test_a_token_without_a_sampler_log_prob_counts_as_drawn_from_the_old_policy(run, tmp_path):
    copy = tmp_path / "run"
    (copy / "tokens").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):
        (copy / name).write_bytes((run.folder / name).read_bytes())
    table = run.tokens(1)
    table["logp_sampler"] += 0.1
    table.loc[0, "logp_sampler"] = np.nan
    table.to_parquet(copy / "tokens/step-000001-0.parquet")
    again = recompute(Run(copy).rollout(1), run.method())
    assert again.weight[0] == 1.0
    assert not Run(copy).rollout(1).complete  # the number of responses is not in the file


def test_a_folder_that_is_no_run_and_a_broken_file_are_named(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has no config\.yaml"):
        Run(tmp_path)
    (tmp_path / "config.yaml").write_text("method: hapo\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0}\n{"step": \n{"step": 3, "loss": 0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is malformed"):
        _ = Run(tmp_path).metrics
    with pytest.raises(ValueError, match=r"no rollout batch 3 was recorded, only \[1, 5\]"):
        run.tokens(3)


@pytest.mark.parametrize(
    ("spec", "name", "options"),
    [
        ("dapo", "dapo", {}),
        ("trl:dapo", "trl:dapo", {}),
        ("trl:grpo:beta=0.04", "trl:grpo", {"beta": 0.04}),
        ("hapo:temperature={tau: 0.2, rule: bounded},eps_high=3e-1", "hapo",
         {"temperature": {"tau": 0.2, "rule": "bounded"}, "eps_high": 0.3}),
    ],
)  # fmt: skip
def test_a_method_with_options_as_text(spec, name, options):
    assert parse_arm(spec) == (name, options)


def test_a_step_without_a_valid_token_writes_nothing(tmp_path):
    from hapo.engines.records import RunRecords

    method = hapo.method("dapo", filter_groups=False)
    batch = hapo.TokenBatch(
        mask=torch.zeros(2, 3, dtype=torch.bool),
        old_logp=torch.zeros(2, 3),
        logp=torch.zeros(2, 3),
        old_entropy=torch.zeros(2, 3),
        reward=torch.tensor([0.0, 1.0]),
        group=torch.tensor([0, 0]),
    )
    batch = method.prepare(batch)
    records = RunRecords(tmp_path)
    records.add_tokens(
        1,
        1,
        batch,
        method.loss(batch),
        mask=batch.mask,
        response=torch.arange(2),
        responses=2,
        ids=torch.zeros(2, 3, dtype=torch.long),
        texts=[["a"] * 3] * 2,
        prompts=["p"] * 2,
        temperature=None,
    )
    records.write_tokens(1)
    assert not (tmp_path / "tokens").exists()
