"""What a run of verl must not depend on, what it leaves behind, and how it goes on after a kill."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hapo import EntropyStats
from hapo.insight.report import write_report
from hapo.insight.run import Run, recompute
from tests.verl.launch import ACTOR, HAPO, LIMIT, VerlRun, launch
from tests.verl.replay import tokens

PACKED = (
    f"{ACTOR}.use_dynamic_bsz=True",
    f"{ACTOR}.ppo_max_token_len_per_gpu=48",
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True",
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=64",
)
"""Micro-batches of equal tokens instead of equal rows."""


def metrics(run: VerlRun) -> dict[int, dict[str, float]]:
    found = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in found}


def by_token(run: VerlRun) -> pd.DataFrame:
    """Token records in an order that no rank or reordering changes."""
    table = tokens(run.out)
    table["text of all"] = table.groupby(["step", "response"])["text"].transform("".join)
    return table.sort_values(["step", "prompt", "text of all", "response", "position"], ignore_index=True)


def same(one: VerlRun, other: VerlRun, within: float) -> None:
    """The same tokens with the same advantages, signals and ratios, the same losses and gradient norms."""
    a, b = by_token(one), by_token(other)
    assert (a["id"] == b["id"]).all() and (a["prompt"] == b["prompt"]).all()
    for column in ("advantage", "signal", "ratio", "logp_new", "temperature", "weight"):
        assert np.allclose(a[column], b[column], rtol=within, atol=within, equal_nan=True), column
    for step, line in metrics(other).items():  # verl saves before it logs: a kill in between costs a line
        for name in ("loss", "grad_norm", "clip_ratio/low_mean", "ratio/mean", "entropy_stats/pivot"):
            assert line[name] == pytest.approx(metrics(one)[step][name], rel=within, abs=within), name
    assert len(metrics(other)) >= len(metrics(one)) - 1


@pytest.fixture(scope="module")
def again(hapo_run: VerlRun, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VerlRun]:
    """The command of a finished run once more, on a copy of its folder."""
    folder = tmp_path_factory.mktemp("again")
    shutil.copytree(hapo_run.out, folder / "run")
    run = launch(inputs, folder, *HAPO)
    yield run
    run.kill()


@pytest.mark.usefixtures("again")  # which goes on beside this one
def test_two_ranks_packed_killed_and_resumed(
    hapo_run: VerlRun, inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """On two ranks, in packed micro-batches, killed after a checkpoint and started again by the same command: the
    same tokens, statistics and numbers as in a whole run on one rank, in micro-batches of equal rows."""
    folder, command = tmp_path_factory.mktemp("killed"), (*HAPO, *PACKED)
    killed = launch(inputs, folder, *command, ranks=2)
    saved = killed.out / "latest_checkpointed_iteration.txt"
    deadline = time.monotonic() + LIMIT
    while not saved.is_file() and killed.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill()
    assert saved.is_file(), killed.log[-6000:]
    at = int(saved.read_text())
    assert at < 3, "the run was over before it could be killed"
    resumed = launch(inputs, folder, *command, ranks=2).wait()
    for step in (at, 3):
        ours, theirs = (
            json.loads((of.out / f"global_step_{step}/hapo.json").read_text()) for of in (hapo_run, resumed)
        )
        assert ours["steps"] == theirs["steps"] == 3 * step
        assert theirs["stats"] == pytest.approx(ours["stats"], rel=1e-4)
    same(hapo_run, resumed, within=1e-4)
    once, again = (Run(of.out) for of in (hapo_run, resumed))
    assert once.finished is not None and again.finished is not None
    assert {**again.finished, "seconds": 0} == {**once.finished, "seconds": 0}
    columns = ["step", "num_tokens", "mean", "problems"]
    later = again.evaluations[again.evaluations["step"].isin(once.evaluations["step"])]  # verl validates once more
    assert later[columns].to_numpy().tolist() == once.evaluations[columns].to_numpy().tolist()


@pytest.mark.parametrize(("name", "rollouts", "end"), [("hapo", [1, 4, 7], 9), ("by_token", [1, 7], 12)])
def test_records(request: pytest.FixtureRequest, tmp_path: Path, name: str, rollouts: list[int], end: int) -> None:
    """Report and microscope read the run, and the core makes of its records what training made."""
    found = Run(request.getfixturevalue(f"{name}_run").out)
    assert found.manifest["versions"]["verl"].startswith("0.9.") and found.finished is not None
    assert found.finished["why"] == "max_steps" and found.finished["num_tokens"] > 0
    assert found.rollouts == rollouts
    assert found.evaluations["step"].tolist() == [0, end]
    assert found.evaluations["binary"].all() and found.evaluations["problems"].tolist() == [8, 8]
    for first in found.rollouts:
        rollout = found.rollout(first)
        assert rollout.complete
        table = found.tokens(first).sort_values(["response", "step", "position"], ignore_index=True)
        again = recompute(rollout, found.method())
        for column in ("advantage", "advantage_used", "signal", "ratio", "bound_low", "bound_high"):
            assert np.allclose(table[column], again[column], atol=2e-6, rtol=1e-5, equal_nan=True), column
        assert (table["clipped"] == again["clipped"]).all()
        if name == "hapo":
            assert (table["verdict"] == (table["reward"] > 0)).all()  # `acc`, and the score
    write_report([found.folder], tmp_path / "report.html")
    assert "microscope" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", ["stapo", "by_token"])
def test_scores_by_token(request: pytest.FixtureRequest, name: str) -> None:
    """What the reward function gave each token: learnt from, recorded, and summed up in verl's own metrics."""
    run = request.getfixturevalue(f"{name}_run")
    table = tokens(run.out)
    given = np.where(table["position"] % 2, (table["id"] % 5) / 4, 0)
    assert np.allclose(table["token_reward"], given) and (given > 0).sum() > 32
    first = table.drop_duplicates(["rollout", "response", "position"])
    rows = first.groupby(["rollout", "response"])
    assert np.allclose(rows["token_reward"].sum(), rows["reward"].first())
    if name == "by_token":
        assert (rows["verdict"].first() == (rows["reward"].first() > 3.5)).all()  # the filter's metric is `acc`
    means = rows["reward"].first().groupby("rollout").mean()
    for mean, line in zip(means, metrics(run).values(), strict=True):
        assert line["reward"] == pytest.approx(mean, abs=1e-5)
    assert (rows["advantage"].nunique() > 1).sum() > 16  # no advantage of a whole response


@pytest.mark.parametrize(("name", "second"), [("hapo", 4), ("by_token", 7)])
def test_first_rollout_is_drawn_at_the_base_temperature(
    request: pytest.FixtureRequest, name: str, second: int
) -> None:
    """Then every token at T_base times the factor of its entropy, by the statistics of the rollout before."""
    run = request.getfixturevalue(f"{name}_run")
    table, method = tokens(run.out), Run(run.out).method()
    assert method.temperature_rule is not None
    apart = (table["logp_sampler"] - table["logp_old"]).abs()
    first = table["rollout"] == 1
    assert (table[first]["temperature"] == 1).all() and apart[first].max() < 1e-5
    drawn = table[table["rollout"] == second]
    stats = EntropyStats(**json.loads((run.out / "global_step_1/hapo.json").read_text())["stats"])
    factor = method.temperature_rule(torch.tensor(drawn["entropy"].to_numpy()), stats).numpy()
    assert np.allclose(drawn["temperature"], factor, atol=1e-6) and factor.std() > 0.01
    assert apart[drawn.index].max() > 0.05
    assert np.allclose(
        drawn["weight"], np.minimum(np.exp(drawn["logp_old"] - drawn["logp_sampler"]), 2), atol=1e-5
    )


def test_a_finished_run_stays_finished(hapo_run: VerlRun, again: VerlRun) -> None:
    """The same command again trains nothing and takes nothing back."""
    again.wait()
    for name in ("metrics.jsonl", "evaluations.jsonl", "finished.json"):
        assert (again.out / name).read_text() == (hapo_run.out / name).read_text(), name
