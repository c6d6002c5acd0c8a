"""AsyncHAPOTrainer with TRL's own worker process and a real server: weights go by disk, versions come back.

Not one of `make test-vllm`: server, trainer and worker import what takes more than a minute. `make test-vllm-async`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .serving import serving

ROOT = Path(__file__).parents[2]
SAME = 1e-4
"""Nats, between vLLM's float32 and torch's."""

RUNS: dict[str, dict[str, Any]] = {
    "dapo": {"method": "dapo", "method_options": {"filter_groups": False}, "learning_rate": 1e-3},
    # With a learning rate of 0 the policy stays, so that the temperature alone parts sampler and policy.
    "hapo": {"method": "hapo", "method_options": {"temperature": {"tau": 0.3}}, "learning_rate": 0.0},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `async_run.py` wrote of each run, one after the other on one server."""
    folder = tmp_path_factory.mktemp("async")
    given, out = folder / "in.json", folder / "out.json"
    given.write_text(json.dumps(RUNS))
    with serving(folder / "log", "--enable-scale-out", VLLM_SERVER_DEV_MODE="1") as url:
        run = [sys.executable, str(ROOT / "tests/vllm/async_run.py"), url, str(given), str(out)]
        done = subprocess.run(run, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", RUNS)
def test_three_steps_and_more_learn_from_labelled_tokens(runs, name):
    found = runs[name]
    assert len(found["lines"]) == 4
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in found["lines"])
    assert found["labels"][:3] == [-1, 1, 2]  # context, and the weights of the first two syncs
    staleness = np.array(found["records"]["staleness"])
    assert staleness.min() == 0 and staleness.max() in (1, 2)  # max_staleness, and one more
    assert [line["batch/groups_per_step"] for line in found["lines"]] == [2.0] * 4


def test_vllm_draws_with_the_weights_that_its_label_says(runs):
    """Those of the version, to float32 rounding; those of any other version are far away."""
    found = runs["dapo"]["distances"]
    assert {gap["version"] for gap in found} >= {1, 2}
    for gap in found:
        own = gap.pop(str(gap["version"]))
        assert own < SAME
    others = [distance for gap in found for name, distance in gap.items() if name != "version"]
    assert np.median(others) > 10 * SAME


def test_the_first_step_is_on_policy_and_later_ones_are_not(runs):
    records = {name: np.array(values) for name, values in runs["dapo"]["records"].items()}
    gap = np.abs(records["logp_old"] - records["logp_new"])
    fresh = records["staleness"] == 0
    assert fresh[records["step"] == 1].all()
    assert gap[fresh].max() < SAME
    assert gap[~fresh].mean() > 10 * SAME


def test_the_temperature_rule_goes_out_once_there_are_statistics(runs):
    """In the first step what drew is the policy; later the sampler's log-probs are those of other temperatures."""
    records = {name: np.array(values) for name, values in runs["hapo"]["records"].items()}
    gap = np.abs(records["logp_old"] - records["logp_sampler"])
    assert gap[records["step"] == 1].max() < SAME
    assert gap[records["step"] == 4].mean() > 0.01
    ratios = [line["ratio/mean"] for line in runs["hapo"]["lines"]]
    assert ratios == pytest.approx([1.0] * 4, abs=1e-4)
