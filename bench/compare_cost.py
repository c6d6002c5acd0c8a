"""What a short `hapo compare` costs, beside an older build: processor seconds of all its processes.

    python -m bench.compare_cost --against ../older --output bench/results/compare_cost.json

Three arms, four seeds, the demo's task and model, 16 optimiser steps, held-out accuracy at the start, half-way and
at the end. The builds take turns; runs of one seed have to come out the same in both.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from .paired import machine, summary

ROOT = Path(__file__).parents[1]
WORDS = (
    "--config bench/compare/near_policy.yaml --arms hapo dapo grpo:beta=0.0 --reference dapo --seeds 4 "
    "--max_steps 16 --evaluate_every 8 --learning_rate 3e-5 --jobs 1"
)
PR_SET_CHILD_SUBREAPER = 36
OF_THE_CLOCK = ("seconds", "seconds_to_target")


def of_children() -> float:
    """Processor seconds of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def wait_for_all() -> None:
    """The processes that a command left behind come to this one, and count once they have ended."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def compare(checkout: Path, folder: Path) -> dict[str, float]:
    """One call with the code of a checkout."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout / "src")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # or every process compiles the older checkout
    began, used = time.perf_counter(), of_children()
    command = [sys.executable, "-m", "hapo.cli", "compare", *WORDS.split(), "--output_dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{checkout}: hapo compare failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    wait_for_all()
    return {"cpu_s": round(of_children() - used, 2), "wall_s": round(time.perf_counter() - began, 2)}


def differing(results: dict[str, pd.DataFrame]) -> Iterator[str]:
    """Columns in which the builds' runs are not the same."""
    new, old = (rows.sort_values(["arm", "seed"], ignore_index=True) for rows in results.values())
    for name in new.columns.intersection(old.columns).drop(list(OF_THE_CLOCK), errors="ignore"):
        if not new[name].equals(old[name]):
            yield name


def measured(against: Path, pairs: int) -> dict[str, Any]:
    """Turns of both builds."""
    contenders = {"new": ROOT, "old": against.resolve()}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(pairs):
        results = {}
        for name in sorted(contenders, reverse=number % 2 == 1):
            with tempfile.TemporaryDirectory() as folder:
                turns[name].append(compare(contenders[name], Path(folder) / "runs"))
                results[name] = pd.read_csv(Path(folder) / "runs" / "results.csv")
            print(name, turns[name][-1], flush=True)
        if different := list(differing(results)):
            raise RuntimeError(f"the builds' runs differ in {', '.join(different)}")
    ratios = [new["cpu_s"] / old["cpu_s"] for new, old in zip(*turns.values(), strict=True)]
    return {"ratio of CPU seconds": summary(ratios), "turns": turns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="an older checkout")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    begin = machine(packages=("torch", "trl", "transformers"))
    older = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=given.against, check=True, capture_output=True, text=True
    )
    result = {"machine": begin, "against": older.stdout.strip(), "command": WORDS}
    result |= measured(given.against, given.pairs)
    print(json.dumps(result["ratio of CPU seconds"]))
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
