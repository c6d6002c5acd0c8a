"""HAPOTrainer with vLLM in the same process: statistics reach the requests, log-probs come back, weights follow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GAP = "sampling/sampling_logp_difference/mean"

RUNS: dict[str, dict[str, Any]] = {
    # Six rollouts, an optimiser step on each; weights are sent before every one, but not before the last two.
    "without temperature": {
        "method": "dapo",
        "method_options": {"filter_groups": False},
        "learning_rate": 1e-3,
        "num_iterations": 1,
        "synced": 4,
    },
    # With a learning rate of 0 the policy stays, so that a pass of our own can replay the last rollout.
    "hapo": {"method": "hapo", "method_options": {"temperature": {"tau": 0.3}}, "learning_rate": 0.0},
    "another method": {
        "method": "dapo",
        "method_options": {"temperature": {"tau": 0.3, "rule": "zscore"}},
        "learning_rate": 0.0,
        "max_steps": 4,
    },
    "not scored": {
        "method": "hapo",
        "method_options": {"temperature": {"tau": 0.3}},
        "learning_rate": 0.0,
        "score_rollouts": False,
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `trl_run.py` wrote of each run: a process for all of them."""
    folder = tmp_path_factory.mktemp("trl")
    given, out = folder / "in.json", folder / "out.json"
    given.write_text(json.dumps(RUNS))
    command = [sys.executable, str(ROOT / "tests/vllm/trl_run.py"), str(given), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def gaps(found: dict[str, Any]) -> list[float]:
    return [line[GAP] for line in found["lines"] if GAP in line]


def test_without_temperature_the_sampler_follows_the_policy(runs):
    """And falls behind once weights are no longer sent."""
    found = gaps(runs["without temperature"])
    assert len(found) == 6
    assert max(found[:4]) < 1e-4
    assert found[5] > 1e-2


def test_the_temperature_reaches_the_requests_and_its_log_probs_come_back(runs):
    found = runs["hapo"]
    lines = [line for line in found["lines"] if GAP in line]
    assert lines[0][GAP] < 1e-4  # no statistics yet: T_base
    assert lines[-1][GAP] > 1e-2
    assert lines[-1]["temperature/min"] < 0.9 < lines[-1]["temperature/max"]
    assert found["replayed_gap"] < 1e-4


def test_another_method_takes_the_temperature_too(runs):
    found = runs["another method"]
    assert found["replayed_gap"] < 1e-4
    assert gaps(found)[-1] > 1e-2


def test_what_vllm_knew_stands_for_a_scoring_pass(runs):
    """Log-probs and entropies of the last rollout, its third, which is not scored: 1 and 2 are, and compared."""
    found = runs["not scored"]
    assert found["scored"] == [True, True, False]
    assert found["old_gap"] < 1e-4 and found["entropy_gap"] < 1e-4
    assert found["replayed_gap"] < 1e-4
