"""Which tasks of reasoning-gym make other problems in another process: alone, and through hapo's judge.

    python bench/gym_repeats.py [TASK ...] [--entries 100] [--seconds 40] [--output FILE.json]

Each task is made three times: with hash seed 0, the same in reverse order, and with hash seed 1. Counted are the
entries of which question or answer differ from the first time. A task is cut off after some seconds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hapo.tasks.verifier import Judge, Unchecked

SEED = 7
ALONE = """
import json, os, sys
from reasoning_gym import create_dataset
replies = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
data = create_dataset(sys.argv[1], seed=int(sys.argv[2]), size=int(sys.argv[3]))
for line in sys.stdin:
    entry = data[int(line)]
    print(json.dumps([entry["question"], entry["answer"]]), file=replies, flush=True)
"""


@contextmanager
def alone(name: str, entries: int, hash_seed: str) -> Iterator[Any]:
    """What makes an entry of reasoning-gym as it is, in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE, name, str(SEED), str(entries)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def make(index: int) -> Any:
        print(index, file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    try:
        yield make
    finally:
        process.kill()
        process.communicate()


@contextmanager
def judged(name: str, entries: int, hash_seed: str) -> Iterator[Any]:
    """What makes an entry through hapo's judge, in a process with that hash seed."""
    os.environ["PYTHONHASHSEED"] = hash_seed
    judge = Judge("reasoning_gym", 60.0, name=name, options={})

    def make(index: int) -> Any:
        problem = judge.call("problem", json.dumps([SEED, entries, index]))
        return [problem["question"], problem["answer"]]

    try:
        yield make
    finally:
        judge.close()


def made(
    how: Any, name: str, entries: int, hash_seed: str, order: Iterable[int], seconds: float
) -> dict[int, Any]:
    """The entries in this order, as many as the time allows."""
    found, end = {}, time.monotonic() + seconds
    with how(name, entries, hash_seed) as make:
        for index in order:
            found[index] = make(index)
            if time.monotonic() > end:
                break
    return found


def differing(how: Any, name: str, entries: int, seconds: float) -> dict[str, Any]:
    """How many entries were made by all three, and how many of them differ."""
    first = made(how, name, entries, "0", range(entries), seconds)
    size = len(first)  # the others make those, without a limit
    backwards = made(how, name, entries, "0", reversed(range(size)), 1e9)
    other = made(how, name, entries, "1", range(size), 1e9)
    return {
        "entries": size,
        "reverse order": sum(first[i] != backwards[i] for i in first),
        "another hash seed": sum(first[i] != other[i] for i in first),
    }


def main() -> None:
    """Measure, print what differs, and write all."""
    from reasoning_gym.factory import DATASETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=sorted(DATASETS))
    parser.add_argument("--entries", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    tasks: dict[str, Any] = {}
    for name in given.tasks:
        try:
            tasks[name] = {
                how.__name__: differing(how, name, given.entries, given.seconds) for how in (alone, judged)
            }
        except (Unchecked, ValueError, BrokenPipeError, RuntimeError) as error:
            tasks[name] = {"error": str(error)}
        shown = json.dumps(tasks[name])
        if "error" in tasks[name] or any(
            v for one in tasks[name].values() for k, v in one.items() if k != "entries"
        ):
            print(name, shown, flush=True)
    if given.output:
        versions = {"reasoning-gym": importlib.metadata.version("reasoning-gym"), "python": sys.version.split()[0]}
        given.output.write_text(json.dumps({"versions": versions, "seed": SEED, "tasks": tasks}, indent=1) + "\n")


if __name__ == "__main__":
    main()
