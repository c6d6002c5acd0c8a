"""HAPOTrainer with a vLLM server: its sampling masks come over HTTP, and make ratios exact."""

from __future__ import annotations

import json
import subprocess
import sys

from hapo.versions import SERVER_FLAGS
from tests.vllm.runners import needs_v2
from tests.vllm.serving import serving
from tests.vllm.test_trl import GAP, ROOT
from tests.vllm.test_trl_support import STILL


@needs_v2
def test_ratios_are_exact_over_the_masks_of_a_server(tmp_path):
    """At T_base, and under the temperature rule of the second rollout."""
    given, out = tmp_path / "in.json", tmp_path / "out.json"
    given.write_text(json.dumps({"with": {**STILL, "sampling_support": True}}))
    with serving(tmp_path / "log", *SERVER_FLAGS, runner_v2=True, VLLM_SERVER_DEV_MODE="1") as url:
        command = [sys.executable, str(ROOT / "tests/vllm/trl_run.py"), str(given), str(out), url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())["with"]
    lines = [line for line in found["lines"] if GAP in line]
    assert lines[0][GAP] < 1e-4  # no statistics yet: T_base
    assert found["replayed_gap"] < 1e-4
    sizes = [sum(t >= 0 for t in s) for part in found["supports"] for row in part for s in row]
    assert max(sizes) > 2 and max(sizes) <= 20
