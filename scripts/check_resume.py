"""Kills the demo without warning, resumes it, and compares it with an uninterrupted run, bit for bit.

    python scripts/check_resume.py REFERENCE_RUN NEW_FOLDER [--at STEP]

REFERENCE_RUN is a finished `hapo train --output_dir REFERENCE_RUN` of the same seed on this machine.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file

CLOCKS = ("step_time", "wall_seconds", "train_runtime", "train_samples_per_second", "train_steps_per_second")


def main() -> int:
    """Run, kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--at", type=int, default=None, help="optimiser step to kill at; default: the middle")
    options = parser.parse_args()
    reference = metrics(options.reference)
    at = options.at or reference[-1]["step"] // 2 + 5
    hapo = [sys.executable, "-m", "hapo.cli", "train"]
    seed = json.loads((options.reference / "manifest.json").read_text())["seed"]
    run = subprocess.Popen([*hapo, "--output_dir", str(options.folder), "--seed", str(seed)])
    while run.poll() is None and (step := last_step(options.folder)) < at:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    print(f"killed with SIGKILL at step {step} (exit code {run.returncode})")
    subprocess.run([*hapo, "--resume", str(options.folder)], check=True)

    weights, resumed = (load_file(f / "model" / "model.safetensors") for f in (options.reference, options.folder))
    unequal = [name for name in weights if not torch.equal(weights[name], resumed[name])]
    lines = metrics(options.folder)
    different = [a["step"] for a, b in zip(reference, lines, strict=True) if a != b]
    for step, key in sorted(
        {(a["step"], k) for a, b in zip(reference, lines, strict=True) for k in a if a[k] != b.get(k)}
    )[:5]:
        print(f"step {step}: {key} differs")
    tokens = sorted(p.name for p in (options.reference / "tokens").iterdir())
    files = [n for n in tokens if not same(options.reference / "tokens" / n, options.folder / "tokens" / n)]
    print(
        f"weights: {len(weights) - len(unequal)} of {len(weights)} tensors equal bit for bit\n"
        f"metrics: {len(reference) - len(different)} of {len(reference)} lines equal\n"
        f"token records: {len(tokens) - len(files)} of {len(tokens)} files equal"
    )
    return 1 if unequal or different or files else 0


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKS and not k.startswith("time/")} for line in lines]


def last_step(run: Path) -> int:
    """The last optimiser step in the records so far."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except ValueError:  # a line that is being written
        return 0


def same(a: Path, b: Path) -> bool:
    """Whether two token records hold the same values."""
    return b.is_file() and pd.read_parquet(a).equals(pd.read_parquet(b))


if __name__ == "__main__":
    sys.exit(main())
