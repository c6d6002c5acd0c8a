"""Contenders in turns, each in a process of its own, so that each has its own memory and none waits beside
another.

A contender is a function of a `Baton`, which it takes before each unit of work and hands back after it:

    def contender(baton):
        prepare()
        while baton.begin():
            work()
            baton.end()

While one works, the others block on a pipe. Rounds of turns run A B, B A, A B, ...; the first ones warm up and
are in no figure. The same rounds make the pairs, whose ratios are free of what the machine does over minutes.

Seconds of the processors are those of the contender's process with its threads, without its subprocesses (the
worker that verifies mathematical answers). Memory is resident: `peak_mib` the highest of the turn (VmHWM, set
back at its beginning through /proc/self/clear_refs, hence Linux), libraries, weights and optimiser included;
`grown_mib` how far that is above what was held when the turn began. On CUDA seconds are between two events, and
memory is that of torch's allocator.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import permutations
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from .paired import summary

CONTEXT = multiprocessing.get_context("spawn")
TIMEOUT = 3600.0


@dataclass(frozen=True)
class Turn:
    """What one unit of work took."""

    cpu_s: float
    wall_s: float
    peak_mib: float
    grown_mib: float
    figures: dict[str, float] = field(default_factory=dict)
    """The contender's own."""

    def flat(self) -> dict[str, float]:
        own = asdict(self)
        return own | own.pop("figures")


class Baton:
    """The contender's end: whose turn it is, and the clocks of the turn."""

    def __init__(self, pipe: Connection, device: str) -> None:
        self._pipe, self._cuda = pipe, device == "cuda"

    def begin(self) -> bool:
        """Wait for the next turn, and start its clocks; False where there is none."""
        if not self._pipe.recv():
            return False
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated() / 2**20
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self._held = _resident("VmRSS")
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        return True

    def end(self, **figures: float) -> None:
        """Stop the clocks and report the turn, with figures of the contender's own."""
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            torch.cuda.synchronize()
            cpu = wall = self._event.elapsed_time(event) / 1e3
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            peak = _resident("VmHWM")
        self._pipe.send(("turn", Turn(cpu, wall, peak, peak - self._held, figures)))


Contender = Callable[[Baton], Any]
"""A function of a module, or a `functools.partial` of one: it is sent to another process."""


class Child:
    """The parent's end of a contender's process.

    Its methods raise RuntimeError with the child's traceback where it failed, TimeoutError where it is silent for
    `timeout` seconds.
    """

    def __init__(self, name: str, contender: Contender, *, device: str = "cpu", timeout: float = TIMEOUT) -> None:
        self.name, self._timeout = name, timeout
        self._pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_contend, args=(theirs, contender, device), name=name)
        self._process.start()
        theirs.close()

    def turn(self) -> Turn:
        """Let it work once."""
        return self._ask(True, "turn")

    def result(self) -> Any:
        """No turns more: let it come to its end, and take what it returns."""
        found = self._ask(False, "end")
        self._process.join()
        return found

    def kill(self) -> None:
        """End it, wherever it is."""
        self._process.kill()
        self._process.join()

    def _ask(self, go: bool, expected: str) -> Any:
        try:
            self._pipe.send(go)
            if not self._pipe.poll(self._timeout):
                raise TimeoutError(f"{self.name} gave no sign for {self._timeout:g} s")
            kind, found = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            raise RuntimeError(f"{self.name} died with exit code {self._process.exitcode}") from None
        if kind != expected:
            raise RuntimeError(
                f"{self.name} failed:\n{found}" if kind == "error" else f"{self.name} ended before its turns did"
            )
        return found


def alternate(
    contenders: dict[str, Contender],
    *,
    pairs: int = 7,
    warm_up: int = 1,
    device: str = "cpu",
    timeout: float = TIMEOUT,
) -> tuple[dict[str, list[Turn]], dict[str, Any]]:
    """The counted turns of each contender, and what each returned at its end."""
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    children = [Child(name, one, device=device, timeout=timeout) for name, one in contenders.items()]
    try:
        for number in range(-warm_up, pairs):
            for child in children[:: -1 if number % 2 else 1]:
                turn = child.turn()
                print(f"turn {number} {child.name}: {_told(turn)}", file=sys.stderr, flush=True)
                if number >= 0:
                    turns[child.name].append(turn)
        return turns, {child.name: child.result() for child in children}
    finally:
        for child in children:
            child.kill()


def report(turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Medians with quartiles of every contender and figure, and the ratio of every two, pair by pair."""
    flat = {name: [turn.flat() for turn in given] for name, given in turns.items()}
    figures = {
        name: {key: summary([turn[key] for turn in given]) for key in given[0]} for name, given in flat.items()
    }
    ratios = {
        f"{a} / {b}": {
            key: _ratio([x[key] for x in flat[a]], [y[key] for y in flat[b]])
            for key in ("cpu_s", "wall_s", "peak_mib", "grown_mib")
            if all(y[key] for y in flat[b])
        }
        for a, b in permutations(flat, 2)
    }
    return {"contenders": figures, "ratios": ratios}


def shown(value: dict[str, Any], digits: int = 2) -> str:
    """A summary as text: the median and its quartiles."""
    return f"{value['median']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def _contend(pipe: Connection, contender: Contender, device: str) -> None:
    try:
        pipe.send(("end", contender(Baton(pipe, device))))
    except EOFError:
        return  # the parent has gone
    except BaseException:
        pipe.send(("error", traceback.format_exc()))


def _ratio(a: list[float], b: list[float]) -> dict[str, Any]:
    pairs = [x / y for x, y in zip(a, b, strict=True)]
    return {**summary(pairs), "pairs": [round(pair, 4) for pair in pairs]}


def _resident(name: str) -> float:
    """MiB."""
    line = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line is not None
    return int(line[1]) / 1024


def _told(turn: Turn) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in turn.flat().items())
