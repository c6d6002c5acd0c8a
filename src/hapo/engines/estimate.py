"""Held-out accuracy with its interval: what a run's evaluations.jsonl holds, whatever engine measured it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """Mean score over problems, with its 95 % interval."""

    mean: float
    low: float
    high: float
    problems: int
    samples: int
    binary: bool
    """Every score is 0 or 1: the mean is an accuracy."""

    def __str__(self) -> str:
        if self.binary:
            return f"{100 * self.mean:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Estimate:
        """From what `to_dict` gave, among other values."""
        return cls(**{f.name: values[f.name] for f in fields(cls)})

    @classmethod
    def from_scores(cls, scores: Sequence[Sequence[float]]) -> Estimate:
        """Of the answers to each problem.

        One 0/1 score a problem: Wilson's interval. Several answers a problem, or other scores: the normal interval
        of the per-problem means, since answers to one problem are not independent.
        """
        from scipy.stats import binomtest, norm

        means = [math.fsum(of) / len(of) for of in scores]
        n, samples = len(means), sum(map(len, scores)) // len(means)
        mean = math.fsum(means) / n
        binary = all(score in (0.0, 1.0) for of in scores for score in of)
        if binary and samples == 1:
            interval = binomtest(round(mean * n), n).proportion_ci(0.95, method="wilson")
            return cls(mean, float(interval.low), float(interval.high), n, samples, binary)
        variance = math.fsum((m - mean) ** 2 for m in means) / (n - 1) if n > 1 else math.inf
        half = float(norm.ppf(0.975)) * math.sqrt(variance / n)
        low, high = mean - half, mean + half
        return cls(mean, max(low, 0.0) if binary else low, min(high, 1.0) if binary else high, n, samples, binary)
