"""Metrics of a run as the doctor reads them.

First and last, of a metric, are the means of the first and of the last quarter of its logged values.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from .run import Run

if TYPE_CHECKING:
    from ..method import Method

TREND = 8
"""Fewest logged values that show a trend."""


def values(run: Run, name: str) -> np.ndarray:
    """The finite values of a metric, in the order of training; none where it was not logged."""
    column = run.metrics[name].to_numpy(float) if name in run.metrics else np.empty(0)
    return column[np.isfinite(column)]


def ends(series: np.ndarray) -> tuple[float, float]:
    """First and last: means of the first and of the last quarter; NaN where there is no value."""
    if not len(series):
        return math.nan, math.nan
    quarter = max(len(series) // 4, 1)
    return float(series[:quarter].mean()), float(series[-quarter:].mean())


def noise(series: np.ndarray) -> float:
    """Standard deviation of a value around its trend, from the steps between neighbours."""
    return float(np.diff(series).std()) / math.sqrt(2)


def rose(series: np.ndarray) -> bool:
    """Whether the last quarter is above the first by two standard errors."""
    first, last = ends(series)
    return last - first > 2 * noise(series) * math.sqrt(2 / max(len(series) // 4, 1))


def method_of(run: Run) -> Method | None:
    """The method of a run; None where it names none that can be built, as a baseline of TRL's own."""
    try:
        return run.method()
    except ValueError:
        return None


def longest(run: Run) -> int:
    """The limit of the answers in tokens, or the longest that was logged."""
    return run.config.get("max_completion_length") or int(values(run, "completions/max_length").max(initial=1))


def smaller_rate(run: Run) -> str:
    """A third of the learning rate that was logged."""
    rate = values(run, "learning_rate").max(initial=0.0)
    return f"--learning_rate {rate / 3:.1g}" if rate else "a smaller learning rate"
