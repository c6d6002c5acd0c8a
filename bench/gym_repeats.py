"""Which tasks of reasoning-gym make other problems in another process: alone, and through hapo's judge.

    python -m bench.gym_repeats [TASK ...] [--entries 100] [--seconds 5] [--output bench/results/gym_repeats.json]

Every task is made three times by reasoning-gym as it is: with hash seed 0, the same in reverse order, and with
hash seed 1. Counted are the entries of which question or answer differ from the first time; a task is cut off
after a few seconds. Those that differ are made again by the process in which hapo makes and judges problems.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hapo.tasks.verifier import Judge, Unchecked

SEED = 7
PROGRAM = """
import json, os, sys
from reasoning_gym import create_dataset
replies = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
made = (None, None)
for line in sys.stdin:
    name, seed, size, index = json.loads(line)
    try:
        if made[0] != name:
            made = name, create_dataset(name, seed=seed, size=size)
        entry = made[1][index]
        reply = [entry["question"], entry["answer"]]
    except Exception as error:
        reply = f"{type(error).__name__}: {error}"
    print(json.dumps(reply), file=replies, flush=True)
"""

Make = Callable[[str, int, int], Any]
"""Question and answer of a task's entry, from its name, size and index; text for an error."""


class Alone:
    """reasoning-gym as it is, in a process of its own with that hash seed."""

    def __init__(self, hash_seed: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            text=True,
        )

    def __call__(self, name: str, size: int, index: int) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([name, SEED, size, index]), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


class Judged:
    """The same through hapo's judge, with that hash seed in the environment of whoever starts it."""

    def __init__(self, hash_seed: str) -> None:
        self.hash_seed = hash_seed
        self.judges: dict[str, Judge] = {}

    def __call__(self, name: str, size: int, index: int) -> Any:
        if name not in self.judges:
            os.environ["PYTHONHASHSEED"] = self.hash_seed
            self.judges[name] = Judge("reasoning_gym", 60.0, name=name, options={})
        try:
            problem = self.judges[name].call("problem", json.dumps([SEED, size, index]))
        except Unchecked as error:
            return str(error)
        return [problem["question"], problem["answer"]]


def entries_of(make: Make, name: str, size: int, order: Iterable[int], seconds: float) -> dict[int, Any]:
    """The entries in this order, as many as the time allows."""
    found, end = {}, time.monotonic() + seconds
    for index in order:
        found[index] = make(name, size, index)
        if time.monotonic() > end:
            break
    return found


def differing(makers: list[Make], name: str, size: int, seconds: float) -> dict[str, Any]:
    """How many entries there are, and how many of them the second and the third maker make otherwise."""
    first = entries_of(makers[0], name, size, range(size), seconds)
    made = len(first)  # the others make those, without a limit
    backwards = entries_of(makers[1], name, size, reversed(range(made)), 1e9)
    other = entries_of(makers[2], name, size, range(made), 1e9)
    return {
        "entries": made,
        "errors": sum(isinstance(entry, str) for entry in first.values()),
        "reverse order": sum(first[i] != backwards[i] for i in first),
        "another hash seed": sum(first[i] != other[i] for i in first),
    }


def main() -> None:
    """Measure, print what differs, and write all."""
    from reasoning_gym.factory import DATASETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=sorted(DATASETS))
    parser.add_argument("--entries", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    alone: list[Make] = [Alone(hash_seed) for hash_seed in "001"]
    judged: list[Make] = [Judged(hash_seed) for hash_seed in ("1", "2", "3")]
    tasks: dict[str, Any] = {}
    for name in given.tasks:
        tasks[name] = {"alone": differing(alone, name, given.entries, given.seconds)}
        if any(tasks[name]["alone"][how] for how in ("reverse order", "another hash seed")):
            tasks[name]["judged"] = differing(judged, name, given.entries, 1e9)
        if len(tasks[name]) > 1 or tasks[name]["alone"]["errors"]:
            print(name, json.dumps(tasks[name]), flush=True)
    if given.output:
        versions = {"reasoning-gym": importlib.metadata.version("reasoning-gym"), "python": sys.version.split()[0]}
        given.output.write_text(json.dumps({"versions": versions, "seed": SEED, "tasks": tasks}, indent=1) + "\n")


if __name__ == "__main__":
    main()
