"""verl's numbers against a plain replay: old log-probs, signal, advantages, losses, gradient norms, weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hapo.insight.run import Run
from tests_verl.launch import ACTOR, VerlRun
from tests_verl.replay import replay

CASES = {
    "hapo": ("+hapo.method=hapo",),
    "gspo": ("+hapo.method=gspo",),
    "stapo": ("+hapo.method=stapo",),
    "gtpo": ("+hapo.method=gtpo",),
    "grpo": (
        "+hapo.method=grpo",
        "+hapo.options.kl_coef=0",
        f"{ACTOR}.entropy_coeff=0.05",
    ),
}
BONUS = {"grpo": 0.05}


def apart(pair: tuple[torch.Tensor, torch.Tensor]) -> float:
    return float((pair[0] - pair[1]).abs().max())


def lines(run: VerlRun) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("name", "ranks"), [*((name, 1) for name in CASES), ("stapo", 2)])
def test_replay(run: Callable[..., VerlRun], inputs: Path, name: str, ranks: int) -> None:
    """Every optimiser step of two global steps, from the rollout to the weights that it leaves."""
    found = run(*CASES[name], ranks=ranks)
    method = Run(found.out).method()
    assert method.name == name
    batches = replay(inputs, found.out, method, BONUS.get(name, 0.0))
    assert len(batches) == 2
    for batch, line in zip(batches, lines(found), strict=True):
        assert apart(batch.old_logp) < 2e-4
        assert apart(batch.old_entropy) < 2e-4
        assert batch.signal is None or apart(batch.signal) < 5e-4
        assert apart(batch.advantage) < 1e-6
        assert apart(batch.weight) < 2e-4
        assert len(batch.steps) == 6
        for step in batch.steps:
            theirs = torch.tensor(step.theirs["logp_new"].to_numpy())
            assert (theirs - step.logp).abs().max() < 2e-4
        mean = sum(step.loss for step in batch.steps) / 6
        assert line["loss"] == pytest.approx(mean, abs=1e-4)
        norm = sum(step.grad_norm for step in batch.steps) / 6
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert batch.clipped > 0
    assert max(float((step.theirs["ratio"] - 1).abs().max()) for b in batches for step in b.steps) > 0.2
