"""Figures of named sets: avg@k and pass@k with 95 % intervals, lengths, answers cut off, and their table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from rich.table import Table

from ..insight.statistics import pass_at_k
from ..tasks.benchmarks import ProblemSet
from .measure import Answer

PRESETS: dict[str, dict[str, float | int]] = {
    "paper": {"temperature": 0.5, "top_p": 0.7, "top_k": 0, "samples": 8}
}
"""`paper` is how HAPO (arXiv 2509.16591) evaluates: temperature and samples of the paper, top-p of its code."""

PRESET_LENGTH = 10240
"""max_completion_length under a preset where neither flags nor recipe set it: the paper's for Qwen2.5-Math."""


def figures_of(problem_set: ProblemSet, answers: list[Answer]) -> dict[str, Any]:
    """The figures of one set, in plain values; an answer that was cut off is wrong, whatever it says."""
    counts = np.zeros(len(problem_set.problems))
    for answer in answers:
        counts[answer.problem] += answer.score
    samples = len(answers) // len(counts)
    return {
        "problems": len(counts),
        "of": problem_set.of,
        "samples": samples,
        "avg": interval(counts / samples),
        "pass": {str(k): interval(pass_at_k(counts, samples, k)) for k in range(1, samples + 1)},
        "mean_tokens": sum(answer.tokens for answer in answers) / len(answers),
        "truncated": sum(answer.truncated for answer in answers) / len(answers),
        "unreadable_golds": problem_set.unreadable,
        "source": problem_set.source,
        "sha256": problem_set.sha256,
        "verified": problem_set.verified,
    }


def mark_truncated_wrong(answers: list[Answer]) -> list[Answer]:
    """The answers, with score 0 for those that were cut off."""
    return [replace(answer, score=0.0) if answer.truncated else answer for answer in answers]


def interval(shares: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    """Mean over problems of values in [0, 1], with its 95 % interval.

    Wilson's interval for m (1 - m) n / v problems, with m the mean and v the variance (divisor n) of the n values:
    as many 0/1 values would have this standard error. It is Wilson's own for one sample a problem, lies within
    [0, 1], and has a width where all values are 0 or all are 1 (there, that of n problems).
    """
    from scipy.stats import norm

    n, mean, variance = len(shares), float(shares.mean()), float(shares.var())
    size = n * mean * (1 - mean) / variance if variance > 0 else n
    z = float(norm.ppf(0.975))
    centre = (mean + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * math.sqrt(mean * (1 - mean) / size + z * z / (4 * size * size))
    return {"mean": mean, "low": max(0.0, min(mean, centre - half)), "high": min(1.0, max(mean, centre + half))}


def average(intervals: Sequence[dict[str, float]]) -> dict[str, float]:
    """Unweighted mean over sets, its interval put together from theirs as from independent ones.

    low = mean - sqrt(sum (mean_i - low_i)^2) / sets, and so for high (method of variance estimates recovery).
    """
    sets, mean = len(intervals), math.fsum(i["mean"] for i in intervals) / len(intervals)
    below = math.sqrt(math.fsum((i["mean"] - i["low"]) ** 2 for i in intervals)) / sets
    above = math.sqrt(math.fsum((i["high"] - i["mean"]) ** 2 for i in intervals)) / sets
    return {"mean": mean, "low": mean - below, "high": mean + above}


def averages(sets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`average` of avg@k and of each pass@k over the sets."""
    ks = next(iter(sets.values()))["pass"]
    return {
        "avg": average([s["avg"] for s in sets.values()]),
        "pass": {k: average([s["pass"][k] for s in sets.values()]) for k in ks},
    }


def table_of(sets: dict[str, dict[str, Any]]) -> Table:
    """One row a set, and their average; shares in per cent."""
    samples = next(iter(sets.values()))["samples"]
    ks = [2**i for i in range(1, samples.bit_length()) if 2**i < samples] + [samples] * (samples > 1)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("set", no_wrap=True)
    for column in ("problems", f"avg@{samples}", *(f"pass@{k}" for k in ks), "tokens", "truncated"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, s in sets.items():
        whole = s["problems"] == s["of"]
        table.add_row(
            name,
            str(s["problems"]) if whole else f"{s['problems']} of {s['of']}",
            _shown(s["avg"]),
            *(_shown(s["pass"][str(k)], brief=k < samples) for k in ks),
            f"{s['mean_tokens']:.0f}",
            f"{100 * s['truncated']:.1f}",
        )
    if len(sets) > 1:
        mean = averages(sets)
        passes = (_shown(mean["pass"][str(k)], brief=k < samples) for k in ks)
        table.add_row("average", "", _shown(mean["avg"]), *passes, "", "")
    return table


def rows_of(problem_set: ProblemSet, answers: list[Answer]) -> list[dict[str, Any]]:
    """One row an answer, for Parquet."""
    problems = [problem_set.problems[i] for i in range(len(problem_set.problems))]
    return [
        {
            "set": problem_set.name,
            "question": problems[answer.problem]["question"],
            "gold": problems[answer.problem]["answer"],
            **asdict(answer),
        }
        for answer in answers
    ]


def _shown(i: dict[str, float], *, brief: bool = False) -> str:
    mean = f"{100 * i['mean']:.1f}"
    return mean if brief else f"{mean} [{100 * i['low']:.1f}, {100 * i['high']:.1f}]"
