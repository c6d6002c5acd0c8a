"""A search for the weights of a reward per token, as a page: what was tried, and what is expected where."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import altair as alt
import torch

from ..tasks.search import GaussianProcess
from .compare import Comparison
from .figures import Figure, short, unchecked
from .finding import counted
from .page import new_nonce, render
from .statistics import compare_arms

STEPS = 32
"""Along an edge of the triangle of a figure."""

ALONG = 41
"""Points of a slice."""

Point = Sequence[float]


@dataclass(frozen=True)
class Found:
    """What a search has found so far.

    Attributes:
        channels: what the weights are of, K names.
        lines: the trials on record, the K vertices first: trial, seed, weights, value, low, high, binary, error.
        process: given these trials.
        confirmed: what the confirmation showed, in words; None where there was none.
    """

    channels: tuple[str, ...]
    lines: list[dict[str, Any]]
    process: GaussianProcess = field(repr=False)
    confirmed: str | None

    @property
    def at(self) -> int:
        """The trial with the best weights."""
        return self.process.best

    @property
    def best(self) -> dict[str, Any]:
        """It."""
        return self.lines[self.at]

    @property
    def binary(self) -> bool:
        """Whether the score is an accuracy."""
        return bool(self.best["binary"])

    @property
    def rows(self) -> dict[str, int]:
        """The best trial and those of one channel alone, by name."""
        alone = {f"{name} alone": k for k, name in enumerate(self.channels) if k < len(self.lines)}
        return {"best": self.at, **alone}

    def mean(self, trial: int) -> float:
        """The score that is expected with a trial's weights."""
        return self._expected[0][trial]

    def deviation(self, trial: int) -> float:
        """The standard deviation of that score under the process."""
        return self._expected[1][trial]

    def score(self, value: float) -> str:
        """A score as text."""
        return score(value, self.binary)

    @cached_property
    def _expected(self) -> tuple[list[float], list[float]]:
        return self.at_points([line["weights"] for line in self.lines])

    def at_points(self, points: Sequence[Point]) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the score at points of the simplex."""
        mean, deviation = self.process.posterior(torch.tensor(points, dtype=torch.float64))
        return mean.tolist(), deviation.tolist()

    @cached_property
    @unchecked()
    def figures(self) -> list[Figure]:
        """Expected score and its deviation over the simplex, slices through the best weights, every trial."""
        return [*_triangles(self), _slices(self), _trials(self)]

    @cached_property
    def page(self) -> str:
        """The page, as HTML."""
        failed = sum(line["value"] is None for line in self.lines)
        counts = counted(len(self.lines), "trial") + (f", {failed} of them failed" if failed else "")
        return render(
            "shape.html",
            title=f"Weights of {', '.join(self.channels)}",
            nonce=new_nonce(),
            figures=self.figures,
            found=self,
            counts=counts,
        )


def score(value: float, binary: bool) -> str:
    """A held-out score as text: an accuracy in %, another one as it is."""
    return f"{100 * value:.1f} %" if binary else f"{value:.4g}"


def told(channels: Sequence[str], line: dict[str, Any]) -> str:
    """A trial in words."""
    weights = ", ".join(f"{name} {w:.2f}" for name, w in zip(channels, line["weights"], strict=True))
    if line["value"] is None:
        return f"{weights}: failed ({line['error']})"
    return f"{weights}: {score(line['value'], line['binary'])}"


def picture_files(found: Found) -> dict[str, str | bytes]:
    """The figures as SVG, by the name of their file."""
    return {
        f"figures/{figure.name}.svg": figure.drawn("svg") for figure in found.figures if figure.chart is not None
    }


def verdict(comparison: Comparison) -> str:
    """What a confirmation shows of the best weights, arm dense, against the sparse reward, in words."""
    how = comparison.accuracies[0]
    if comparison.curves["binary"].all():
        table = comparison.table(how)
    else:
        wide = comparison.runs.pivot(index="seed", columns="arm", values=how.column)
        table = compare_arms(wide, "sparse", unit="of the score", scale=1.0) if wide.shape[1] > 1 else None
    return "no run of the best weights came to its end" if table is None else str(table.loc["dense", "verdict"])


def _triangles(found: Found) -> list[Figure]:
    named = (
        (
            "simplex",
            "Expected score over the simplex",
            "Dots are trials: the triangle is the best, crosses failed.",
            "score",
        ),
        ("deviation", "How sure the process is", "Dark is unsure: no trial was near.", "standard deviation"),
    )
    if len(found.channels) != 3:
        missing = f"a triangle shows three channels, and there are {len(found.channels)}: see the slices"
        return [Figure(name, title, look, missing=missing) for name, title, look, _ in named]
    points = [
        (a / STEPS, b / STEPS, (STEPS - a - b) / STEPS) for a in range(STEPS + 1) for b in range(STEPS + 1 - a)
    ]
    values = found.at_points(points)
    return [_triangle(found, points, of, *words) for words, of in zip(named, values, strict=True)]


def _triangle(
    found: Found,
    points: list[tuple[float, float, float]],
    values: list[float],
    name: str,
    title: str,
    look: str,
    of: str,
) -> Figure:
    ground = [{**_place(w), **_weights(found, w), of: short(v)} for w, v in zip(points, values, strict=True)]
    dots = [
        {
            **_place(line["weights"]),
            **_weights(found, line["weights"]),
            "trial": line["trial"],
            "what": "best" if n == found.at else "failed" if line["value"] is None else "trial",
        }
        for n, line in enumerate(found.lines)
    ]
    corners = [
        {**_place([float(i == k) for i in range(3)]), "name": name} for k, name in enumerate(found.channels)
    ]
    x = alt.X("x:Q", axis=None).scale(domain=[-0.15, 1.15])
    y = alt.Y("y:Q", axis=None).scale(domain=[-0.1, 0.97])
    tips = [alt.Tooltip(f"{channel}:Q", format=".2f") for channel in found.channels]
    heat = (
        alt.Chart(alt.Data(values=ground))
        .mark_circle(size=70, opacity=1)
        .encode(
            x=x,
            y=y,
            color=alt.Color(f"{of}:Q", title=of, scale=alt.Scale(scheme="viridis", reverse=of != "score")),
            tooltip=[*tips, alt.Tooltip(f"{of}:Q", format=".4g")],
        )
    )
    kinds = alt.Shape("what:N", legend=None, scale=alt.Scale(domain=["best", "trial", "failed"], range=SHAPES))
    tried = (
        alt.Chart(alt.Data(values=dots))
        .mark_point(filled=True, size=90, opacity=1, color="#ffffff", stroke="#24262b", strokeWidth=1.5)
        .encode(x=x, y=y, shape=kinds, tooltip=["trial:Q", "what:N", *tips])
    )
    names = alt.Chart(alt.Data(values=corners)).encode(x=x, y=y, text="name:N")
    low = names.transform_filter("datum.y < 0.5").mark_text(dy=14)
    high = names.transform_filter("datum.y > 0.5").mark_text(dy=-12)
    return Figure(name, title, look, heat + tried + low + high)


SHAPES = ["triangle-up", "circle", "cross"]
"""Of the best trial, the others, and those that failed."""


def _slices(found: Found) -> Figure:
    best = found.best["weights"]
    points, rows = [], []
    for k, name in enumerate(found.channels):
        rest = 1 - best[k]
        for step in range(ALONG):
            w = step / (ALONG - 1)
            others = [(1 - w) * (b / rest if rest else 1 / (len(best) - 1)) for b in best]
            points.append([w if i == k else others[i] for i in range(len(best))])
            rows.append({"channel": name, "weight": short(w)})
    for row, mean, deviation in zip(rows, *found.at_points(points), strict=True):
        row |= {"score": short(mean), "low": short(mean - 2 * deviation), "high": short(mean + 2 * deviation)}
    data = alt.Chart(alt.Data(values=rows))
    x = alt.X("weight:Q", title="weight of the channel, the others in the best's proportions")
    colour = alt.Color("channel:N", title=None, sort=list(found.channels))
    band = data.mark_area(opacity=0.15).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=colour)
    line = data.mark_line(strokeWidth=2).encode(
        x=x,
        y=_axis(found, "score:Q", "expected held-out score"),
        color=colour,
        tooltip=["channel:N", "weight:Q", "score:Q"],
    )
    look = "Lines meet at the best weights; bands are two standard deviations. A flat line does not matter."
    return Figure("slices", "Slices through the best weights", look, band + line)


def _trials(found: Found) -> Figure:
    rows = [
        {
            "trial": line["trial"],
            **{name: short(line[name]) for name in ("value", "low", "high")},
            "expected": short(found.mean(n)),
            "what": "best" if n == found.at else "trial",
        }
        for n, line in enumerate(found.lines)
        if line["value"] is not None
    ]
    data = alt.Chart(alt.Data(values=rows))
    x = alt.X("trial:Q", title="trial", axis=alt.Axis(tickMinStep=1))
    bar = data.mark_rule(opacity=0.5).encode(x=x, y=alt.Y("low:Q"), y2="high:Q")
    dot = data.mark_point(filled=True, size=70, opacity=1).encode(
        x=x,
        y=_axis(found, "value:Q", "held-out score"),
        color=alt.Color("what:N", legend=None, sort=["trial", "best"]),
        tooltip=["trial:Q", "value:Q", "expected:Q"],
    )
    tick = data.mark_tick(thickness=2, bandSize=18).encode(x=x, y="expected:Q")
    look = "Measured, with 95 % intervals over problems; ticks: what the process expects. The best stands out."
    return Figure("trials", "Every trial", look, bar + tick + dot)


def _axis(found: Found, column: str, title: str) -> alt.Y:
    axis = alt.Axis(format="%") if found.binary else alt.Axis()
    return alt.Y(column, title=title, axis=axis).scale(zero=False)


def _place(weights: Point) -> dict[str, float | None]:
    """Where three weights lie in a triangle of side 1."""
    _, b, c = weights
    return {"x": short(b + c / 2), "y": short(c * math.sqrt(3) / 2)}


def _weights(found: Found, weights: Point) -> dict[str, float | None]:
    return {name: short(w) for name, w in zip(found.channels, weights, strict=True)}
