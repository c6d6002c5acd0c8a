"""HAPOTrainer with vLLM in the same process: statistics reach the requests, log-probs come back, weights follow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GAP = "sampling/sampling_logp_difference/mean"


def run(folder: Path, **options: Any) -> dict[str, Any]:
    """What `trl_run.py` wrote."""
    (folder / "in.json").write_text(json.dumps(options))
    command = [
        sys.executable,
        str(ROOT / "tests_vllm/trl_run.py"),
        str(folder / "in.json"),
        str(folder / "out.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


def test_without_temperature_the_sampler_follows_the_policy(tmp_path):
    """Six rollouts, an optimiser step on each, weights sent before every one."""
    training = {"method": "dapo", "method_options": {"filter_groups": False}, "learning_rate": 1e-3}
    training |= {"num_iterations": 1}
    gaps = [line[GAP] for line in run(tmp_path, **training)["lines"] if GAP in line]
    assert len(gaps) == 6
    assert max(gaps) < 1e-4
    stale = [line[GAP] for line in run(tmp_path, **training, sync=False)["lines"] if GAP in line]
    assert stale[-1] > 1e-2


def test_the_temperature_reaches_the_requests_and_its_log_probs_come_back(tmp_path):
    """With a learning rate of 0 the policy stays, so that a pass of our own can replay the last rollout."""
    found = run(tmp_path, method="hapo", method_options={"temperature": {"tau": 0.3}}, learning_rate=0.0)
    lines = [line for line in found["lines"] if GAP in line]
    assert lines[0][GAP] < 1e-4  # no statistics yet: T_base
    assert lines[-1][GAP] > 1e-2
    assert lines[-1]["temperature/min"] < 0.9 < lines[-1]["temperature/max"]
    assert found["replayed_gap"] < 1e-4


def test_another_method_takes_the_temperature_too(tmp_path):
    options = {"temperature": {"tau": 0.3, "law": "zscore"}}
    found = run(tmp_path, method="dapo", method_options=options, learning_rate=0.0, max_steps=4)
    assert found["replayed_gap"] < 1e-4
    assert [line[GAP] for line in found["lines"] if GAP in line][-1] > 1e-2
