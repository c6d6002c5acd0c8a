"""The trials of a search: which training run each is, what came of it, and their record in the search's folder."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from ..engines.identity import differences
from ..insight.run import Run
from ..insight.shape_page import told
from ..outputs import MADE, check_made, write_made
from ..tasks.search import Trial, propose
from . import UsageError
from .arms import ASIDE, Arm, Job, Recipe, set_aside
from .jobs import make_room, run_all

RECORD, PLANNED = "trials.jsonl", "search.json"
RUNS, CONFIRMED = "trials", "confirmation"

CONFIRMING = 1000
"""The seeds of the confirmation begin so far above those of the trials."""

SPARSE = "sparse"


@dataclass(frozen=True)
class Search:
    """What is searched, where, and how each trial is trained; the trials that were made are in the folder."""

    folder: Path
    channels: tuple[str, ...]
    reward: dict[str, Any]
    """The option `token_reward` without weights."""
    arm: Arm
    """The method and its options."""
    recipe: Recipe
    flags: dict[str, Any]
    """What every trial sets over the recipe."""
    confirming: dict[str, Any]
    """What runs of the confirmation set in their place."""
    content: dict[str, Any]
    """What recipe, data and models are: `content_of`."""
    size: int
    """Problems set aside from the training data, by which trials are measured."""
    initial: int
    seed: int
    """Of the search and of its first trial; those after it count up."""
    at_once: int = field(default=1, compare=False)

    @cached_property
    def plan(self) -> dict[str, Any]:
        """All that decides what the trials are, as JSON."""
        arm = {"method": self.arm.name, "method's options": {**self.arm.options, **self.arm.flags}}
        shape = {"channels": self.channels, "initial": self.initial, "search_size": self.size, "seed": self.seed}
        return json.loads(json.dumps({**self.content, **self.flags, **arm, **shape}, default=str))

    @cached_property
    def of(self) -> str:
        """A hash of the plan."""
        return hashlib.sha256(json.dumps(self.plan, sort_keys=True).encode()).hexdigest()

    def begin(self, files: list[str], replace: bool, console: Console) -> None:
        """Find out whether the folder is free for this search or holds it; with `replace`, make it free.

        Raises:
            UsageError: another search is there, with what differs.
            FileExistsError: a file is there that hapo did not write.
        """
        there = [name for name in (RUNS, CONFIRMED, *files, MADE) if (self.folder / name).exists()]
        if replace and there:
            for name in there:
                set_aside(self.folder / name, self.folder)
            console.print(f"moved aside, to {self.folder / ASIDE}: the search that was there", soft_wrap=True)
        planned = self.folder / PLANNED
        if planned.is_file():
            check_made(self.folder, [PLANNED], self._made_of())
            if words := differences(json.loads(planned.read_text()), self.plan):
                raise UsageError(
                    f"{self.folder} holds another search, with {words}. Nothing was changed: choose another "
                    f"--output_dir, or begin anew with --replace, which moves the old one to {self.folder / ASIDE}"
                )
        check_made(self.folder, files, self.of)
        self.write({PLANNED: json.dumps(self.plan, indent=2) + "\n"})

    def write(self, files: dict[str, str | bytes]) -> None:
        """Files of the search, beside its runs."""
        write_made(self.folder, files, self.of)

    def lines(self) -> list[dict[str, Any]]:
        """The trials on record, in their order."""
        check_made(self.folder, [RECORD], self.of)
        file = self.folder / RECORD
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def proceed(self, most: int, console: Console) -> bool:
        """Train the next trial, or as many of the first ones as run at once, and record them; False at the end.

        Raises:
            ValueError: all trials so far failed.
        """
        lines = self.lines()
        if len(lines) >= most:
            return False
        together = max(1, min(self.at_once, self.initial - len(lines), most - len(lines)))
        jobs: list[Job] = []
        known = trials_of(lines)
        for n in range(len(lines), len(lines) + together):
            # a trial of the design, which is all that `together` can be above 1, does not depend on values
            before = [*known, *(Trial(job_weights(job), 0.0) for job in jobs)]
            weights = propose(before, len(self.channels), self.initial, self.seed)
            jobs.append(self._job(n, weights))
        make_room(jobs, self.folder, "", False, console)
        run_all(jobs, self.at_once, f"trials {len(lines) + 1} to {len(lines) + together}", console)
        for job in jobs:
            lines.append(self._line(len(lines), job))
            console.print(f"trial {len(lines)} of {most}: {told(self.channels, lines[-1])}", soft_wrap=True)
        self.write({RECORD: "".join(json.dumps(line) + "\n" for line in lines)})
        return True

    def confirmation(self, weights: tuple[float, ...], seeds: int) -> dict[tuple[str, int], Job]:
        """Runs of these weights and of the sparse vertex, on seeds that no trial had, by arm and seed."""
        named = "_".join(f"{name}={w:g}" for name, w in zip(self.channels, weights, strict=True))
        channels = [*self.channels, *([] if SPARSE in self.channels else [SPARSE])]
        sparse = {"channels": channels, "weights": [float(name == SPARSE) for name in channels]}
        arms: dict[str, tuple[str, dict[str, Any]]] = {
            "dense": (named, {"weights": list(weights)}),
            SPARSE: (SPARSE, sparse),
        }
        first = self.seed + CONFIRMING
        return {
            (arm, seed): Job(
                self.arm,
                seed,
                self.folder / CONFIRMED / where / f"seed-{seed}",
                self.recipe,
                {**self.confirming, "token_reward": {**self.reward, **reward}},
                self.content,
                self.size,
                called=arm,
            )
            for seed in range(first, first + seeds)
            for arm, (where, reward) in arms.items()
        }

    def _job(self, number: int, weights: tuple[float, ...]) -> Job:
        return Job(
            self.arm,
            self.seed + number,
            self.folder / RUNS / f"{number + 1:03}",
            self.recipe,
            {**self.flags, "token_reward": {**self.reward, "weights": list(weights)}},
            self.content,
            self.size,
            tuning=True,
            called=f"trial {number + 1}",
        )

    def _line(self, number: int, job: Job) -> dict[str, Any]:
        line: dict[str, Any] = {"trial": number + 1, "seed": job.seed, "weights": list(job_weights(job))}
        found: dict[str, Any] = {"value": None, "low": None, "high": None, "binary": None}
        if not job.done:
            return {**line, **found, "error": _last_words(job.folder / "log.txt")}
        measured = Run(job.folder).evaluations
        last = measured[measured.how == "sampled"].iloc[-1]
        if not math.isfinite(last["mean"]):
            return {**line, **found, "error": f"the held-out score is {last['mean']}"}
        bounds = {name: float(last[name]) for name in ("low", "high")}
        return {**line, "value": float(last["mean"]), **bounds, "binary": bool(last["binary"]), "error": None}

    def _made_of(self) -> str:
        """What the files that lie here are made of: also of another search, whose plan is to be read."""
        try:
            return json.loads((self.folder / MADE).read_text())["of"]
        except (OSError, ValueError, TypeError, KeyError):
            return self.of


def trials_of(lines: list[dict[str, Any]]) -> list[Trial]:
    """What the search knows of the trials on record."""
    return [Trial(tuple(line["weights"]), line["value"], _error(line)) for line in lines]


def _error(line: dict[str, Any]) -> float | None:
    """Standard error of a trial's value over its problems, from the 95 % interval; None where it has none."""
    if line["low"] is None or not line["high"] > line["low"]:
        return None
    return (line["high"] - line["low"]) / (2 * 1.96)


def job_weights(job: Job) -> tuple[float, ...]:
    """Of a trial."""
    return tuple(job.flags["token_reward"]["weights"])


def _last_words(log: Path) -> str:
    """The last line of a log that says anything."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()] if log.is_file() else []
    said = next((line for line in reversed(lines) if line), "it was ended from outside")
    return said if len(said) <= 300 else said[:300] + "..."
