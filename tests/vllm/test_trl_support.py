"""HAPOTrainer with vLLM in the same process and Model Runner V2: the engine's sampling masks make ratios exact."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.vllm.runners import needs_v2
from tests.vllm.test_trl import GAP, ROOT

# At this temperature the tiny model leaves several tokens; its weights stay, so that every ratio should be 1.
STILL = {
    "method": "hapo",
    "method_options": {"temperature": {"rule": "zscore", "tau": 0.1}, "filter_groups": False},
    "learning_rate": 0.0,
    "temperature": 2.0,
    "top_p": 0.9,
    "top_k": 20,
    "max_completion_length": 4,
    "per_device_train_batch_size": 8,
    "max_steps": 4,
}
RUNS = {
    "with": STILL,
    "without": {**STILL, "sampling_support": False, "max_steps": 2},
    # The third rollout is the first that is not scored; it is drawn by the temperature rule.
    "not scored": {**STILL, "score_rollouts": False, "max_steps": 6, "max_completion_length": 3},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `trl_run.py` wrote of each run: a process for all of them."""
    tmp_path = tmp_path_factory.mktemp("support")
    given, out = tmp_path / "in.json", tmp_path / "out.json"
    given.write_text(json.dumps(RUNS))
    command = [sys.executable, str(ROOT / "tests/vllm/trl_run.py"), str(given), str(out), "v2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@needs_v2
def test_ratios_are_exact_over_the_masks_and_miss_the_kept_mass_without_them(found):
    lines = [line for line in found["with"]["lines"] if GAP in line]
    assert lines[0][GAP] < 1e-4  # no statistics yet: T_base
    assert found["with"]["replayed_gap"] < 1e-4
    sizes = [sum(t >= 0 for t in s) for part in found["with"]["supports"] for row in part for s in row]
    assert max(sizes) > 2 and max(sizes) <= 20
    assert found["without"]["lines"][0][GAP] > 0.05  # T_base too: all of it is what truncation left


@needs_v2
def test_what_vllm_knew_over_the_masks_stands_for_a_scoring_pass(found):
    """Log-probs of the old policy over the support, entropies of the whole vocabulary."""
    run = found["not scored"]
    assert run["scored"] == [True, True, False]
    assert run["old_gap"] < 1e-4 and run["entropy_gap"] < 1e-4
    assert run["replayed_gap"] < 1e-4
