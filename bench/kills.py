"""Runs that are killed at random and resumed, against one that is not: equal, bit for bit?

    python -m bench.kills [--seed 0] [--kills 10] [--steps 12] [--output bench/results/kills.json]

Trains the bundled model by `hapo train`, once without interruption. Then every run of the same recipe is ended by
SIGKILL and taken up by `hapo train --resume`: half of them at a random time during training, the others at a
random time between their last optimiser step and their report. Compared are the SHA-256 of the weights and,
without what the clock says, metrics.jsonl, evaluations.jsonl, finished.json and the token records. A run that
is killed before its first checkpoint has nothing to resume; it is begun again, as its message says.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from hapo.engines.records import manifest
from hapo.engines.trl.checkpoint import complete_checkpoints

OPTIONS = {
    "train_size": 256,
    "eval_size": 16,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "steps_per_generation": 2,
    "max_num_gen_batches": 2,
    "max_completion_length": 32,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "threads": 1,
}
SECONDS = ("wall_seconds", "step_time", "seconds", "took")
POLL = 0.005
"""Seconds between looks at a run's records."""


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """`hapo train` in a process of its own, whose output goes to a file."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "hapo.cli", "train", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )


def recipe(folder: Path, steps: int, save_steps: int) -> list[str]:
    """The arguments of a run in the folder."""
    told = {**OPTIONS, "max_steps": steps, "save_steps": save_steps, "output_dir": folder}
    return [word for name, value in told.items() for word in (f"--{name}", str(value))]


def lines(file: Path) -> list[dict[str, Any]]:
    """What is in a file of records, without what depends on the clock."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in SECONDS and not k.startswith("time/")} for line in found]


def steps_of(folder: Path) -> int:
    """Optimiser steps in metrics.jsonl so far."""
    file = folder / "metrics.jsonl"
    return file.read_text().count('"loss"') if file.is_file() else 0


def outcome(folder: Path) -> dict[str, Any]:
    """What must be equal between two runs."""
    end = json.loads((folder / "finished.json").read_text())
    tokens = {file.name: pq.read_table(file).to_pylist() for file in sorted((folder / "tokens").glob("*.parquet"))}
    return {
        "weights": hashlib.sha256((folder / "model/model.safetensors").read_bytes()).hexdigest(),
        "metrics": [line for line in lines(folder / "metrics.jsonl") if "loss" in line],
        "evaluations": lines(folder / "evaluations.jsonl"),
        "finished": {name: end[name] for name in ("steps", "num_tokens", "why")},
        "tokens": hashlib.sha256(repr(tokens).encode()).hexdigest(),
        "report": (folder / "report.html").is_file(),
    }


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> float:
    """Until it holds or the process has ended; the moment."""
    while process.poll() is None and not condition():
        time.sleep(POLL)
    return time.monotonic()


def whole_run(folder: Path, steps: int, save_steps: int, log: Path) -> dict[str, float]:
    """A run without interruption: seconds of a step, and from the last step to the report."""
    process = start(recipe(folder, steps, save_steps), log)
    first = wait_for(lambda: steps_of(folder) >= 1, process)
    last = wait_for(lambda: steps_of(folder) >= steps, process)
    report = wait_for(lambda: (folder / "report.html").exists(), process)
    if process.wait() != 0:
        raise RuntimeError(f"the run that nobody kills failed: {log.read_text()[-2000:]}")
    return {"step": (last - first) / (steps - 1), "end": report - last}


def killed_run(folder: Path, steps: int, save_steps: int, log: Path, after: int, seconds: float) -> dict[str, Any]:
    """A run that is killed some seconds after it logged a step, and taken up; what the kill met."""
    process = start(recipe(folder, steps, save_steps), log)
    wait_for(lambda: steps_of(folder) >= after, process)
    time.sleep(seconds)
    process.kill()
    killed = process.wait() == -9
    saved = complete_checkpoints(folder / "checkpoints")
    met = {
        "killed": killed,
        "after_step": steps_of(folder),
        "seconds_after_it": round(seconds, 3),
        "last_checkpoint": int(saved[-1].name.rsplit("-", 1)[1]) if saved else 0,
        "there": [n for n in ("model", "README.md", "finished.json", "report.html") if (folder / n).exists()],
    }
    if saved:
        again = ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        again = recipe(folder, steps, save_steps)
    code = start(again, log).wait()
    if code != 0:
        raise RuntimeError(f"{' '.join(again)} ended with {code} after {met}: {log.read_text()[-2000:]}")
    return met


def main() -> int:
    """Kill, resume, compare, print and write; 1 where a run differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--at_end", type=int, help="kills after the last step (default: half of them)")
    parser.add_argument(
        "--within", type=float, help="seconds from the last step to these (default: to the report)"
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save_steps", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rng, kills = random.Random(given.seed), []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        took = whole_run(place / "whole", given.steps, given.save_steps, place / "whole.txt")
        expected = outcome(place / "whole")
        print(
            f"whole run: {took['step']:.2f} s a step, {took['end']:.2f} s from the last one to the report",
            flush=True,
        )
        for number in range(given.kills):
            at_end = number % 2 == 1 if given.at_end is None else number < given.at_end
            after = given.steps if at_end else rng.randrange(given.steps)
            seconds = rng.uniform(0, (given.within or took["end"]) if at_end else took["step"])
            folder = place / f"killed-{number}"
            met = killed_run(folder, given.steps, given.save_steps, place / f"{number}.txt", after, seconds)
            found = outcome(folder)
            differs = [name for name in expected if found[name] != expected[name]]
            kills.append(
                {"planned": "after the last step" if at_end else "in training", **met, "differs": differs}
            )
            print(json.dumps(kills[-1]), flush=True)
            shutil.rmtree(folder)
    equal = sum(not kill["differs"] for kill in kills)
    print(f"{equal} of {len(kills)} runs equal to the whole one in {', '.join(expected)}")
    if given.output:
        flags = {k: v for k, v in vars(given).items() if k != "output"}
        setting = {**flags, "options": OPTIONS}
        facts = manifest(given.seed)
        told = {name: facts[name] for name in ("created", "python", "machine", "versions")}
        whole = {"weights": expected["weights"], "finished": expected["finished"], "seconds": took}
        written = {**told, "setting": setting, "whole": whole, "equal": equal, "kills": kills}
        given.output.write_text(json.dumps(written, indent=1) + "\n")
    return 0 if equal == len(kills) else 1


if __name__ == "__main__":
    sys.exit(main())
