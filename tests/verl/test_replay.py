"""verl's numbers against a plain replay: old log-probs, signal, advantages, losses, gradient norms, weights.

Two methods of different shape, one of them on both of verl's trainers. The others differ in the core alone, and go through verl's loss in test_methods.py;
verl's own terms, the KL penalty and the entropy bonus, are in test_loss.py.
"""

import json
from pathlib import Path

import pytest
import torch

from hapo.insight.run import Run
from tests.verl.launch import VerlRun
from tests.verl.replay import replay


def apart(pair: tuple[torch.Tensor, torch.Tensor]) -> float:
    return float((pair[0] - pair[1]).abs().max())


def lines(run: VerlRun) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "rollouts", "updates"),
    [("hapo", 3, 3), ("stapo", 2, 6), ("by_token", 2, 6)],
)
def test_replay(request: pytest.FixtureRequest, inputs: Path, name: str, rollouts: int, updates: int) -> None:
    """Every optimiser step, from the rollout to the weights that it leaves: on one rank, on two, and without the queue."""
    found: VerlRun = request.getfixturevalue(f"{name}_run")
    method = Run(found.out).method()
    assert method.name == ("hapo" if name == "by_token" else name)
    batches = replay(inputs, found.out, method)
    assert len(batches) == rollouts
    for batch, line in zip(batches, lines(found), strict=True):
        assert apart(batch.old_logp) < 2e-4
        assert apart(batch.old_entropy) < 2e-4
        assert batch.signal is None or apart(batch.signal) < 5e-4
        assert apart(batch.advantage) < 1e-6
        assert apart(batch.weight) < 2e-4
        assert len(batch.steps) == updates
        for step in batch.steps:
            theirs = torch.tensor(step.theirs["logp_new"].to_numpy())
            assert (theirs - step.logp).abs().max() < 2e-4
        mean = sum(step.loss for step in batch.steps) / updates
        assert line["loss"] == pytest.approx(mean, abs=1e-4)
        norm = sum(step.grad_norm for step in batch.steps) / updates
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert batch.clipped > 0
    assert max(float((step.theirs["ratio"] - 1).abs().max()) for b in batches for step in b.steps) > 0.2
