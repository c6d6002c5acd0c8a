"""Runs that learnt from demonstrations: their method, what it makes of the recorded targets, and their figures."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import altair as alt
import numpy as np
import pandas as pd

from .figures import Figure, short
from .run import Run, parse_arm
from .token_figures import gates, positions
from .tokens import Tokens, parts_of
from .word_figures import dual_entropy, landscape

if TYPE_CHECKING:
    from ..supervised import Supervised

READ = ("logp", "entropy", "rank", "expected_rank")
"""Columns of a target, and fields of `TokenBatch`, that a weight may read."""
_RECORDS = "It is made of token records (`record_tokens_every`), and none were found."


def method_of_targets(run: Run) -> Supervised:
    """The method that a supervised run was trained with.

    Raises:
        ValueError: it cannot be rebuilt from its options.
    """
    from ..methods import supervised

    return supervised(run.config["method"], **(run.config.get("method_options") or {}))


def parse_supervised(spec: str) -> Supervised:
    """The method of a text `NAME[:option=value,...]`, its values read as YAML: `ranktuner:estimator=exact`.

    Raises:
        ValueError: unknown method or option, a policy method, or a text of another form.
    """
    from ..methods import supervised

    name, options = parse_arm(spec)
    return supervised(name, **options)


def reweigh(tokens: pd.DataFrame, method: Supervised) -> pd.DataFrame:
    """What `method` does to recorded targets, one row each in their order: weight, push, clipped and kept.

    push = -N dL/dlogp with N the targets of the optimiser step, which is the weight: how strongly the step raises
    the target's log-prob.

    Raises:
        ValueError: the records lack a column that the method reads.
    """
    import torch

    import hapo

    fields: dict[str, Any] = {
        name: torch.from_numpy(tokens[name].to_numpy(np.float32).copy())[None] for name in READ if name in tokens
    }
    batch = hapo.TokenBatch(mask=torch.ones(1, len(tokens), dtype=torch.bool), **fields)
    weight = method.loss(batch).tokens["weight"][0].numpy() if len(tokens) else np.empty(0, np.float32)
    made = {"weight": weight, "push": weight, "clipped": False, "kept": weight != 0}
    return pd.DataFrame(made, index=tokens.index)


def target_figures(tokens: Tokens) -> list[Figure]:
    """The figures of recorded targets, in the order of a page."""
    figures = (ranks, weights, landscape, dual_entropy, positions, *((gates,) if "gate" in tokens else ()))
    return [figure(tokens) for figure in figures]


def ranks(tokens: Tokens) -> Figure:
    """Rank of the targets against the rank that the model expects at their place: density, log scales."""
    figure = Figure(
        "rank-expected",
        "Rank against expected rank",
        "On the line a target is ranked as the model expects at its place; above it the model is worse than it "
        "thinks, and there is something to learn. Ranks begin at 1, the likeliest token.",
        missing=_RECORDS,
    )
    if not len(tokens):
        return figure
    largest = max(np.nanmax(tokens.column(name)) for name in ("expected_rank", "rank"))
    end = max(float(np.log10(largest.clip(min=1))), 0.3)
    edges = np.linspace(0, end * 1.0001, 33)
    count, total = np.zeros((32, 32)), np.zeros((32, 32))
    for batch in tokens.batches("expected_rank", "rank", "weight"):
        x, y = np.log10(batch["expected_rank"].clip(lower=1)), np.log10(batch["rank"].clip(lower=1))
        count += np.histogram2d(x, y, bins=(edges, edges))[0]
        total += np.histogram2d(x, y, bins=(edges, edges), weights=batch["weight"])[0]
    mean, xs, ys = total / count.clip(min=1), edges, edges
    cells = [
        {
            "x": short(10 ** xs[i]),
            "x2": short(10 ** xs[i + 1]),
            "y": short(10 ** ys[j]),
            "y2": short(10 ** ys[j + 1]),
        }
        | {"targets": int(count[i, j]), "weight": short(mean[i, j])}
        for i, j in zip(*count.nonzero(), strict=True)
    ]
    log = alt.Scale(type="log", nice=False)
    axis = alt.Axis(values=[m * 10.0**k for k in range(6) for m in (1, 2, 5)], format="~g")
    density = alt.Chart(alt.InlineData(values=cells)).mark_rect()
    density = density.encode(
        x=alt.X("x:Q", title="expected rank, log scale", scale=log, axis=axis),
        x2="x2:Q",
        y=alt.Y("y:Q", title="rank of the target, log scale", scale=log, axis=axis),
        y2="y2:Q",
        color=alt.Color("targets:Q", scale=alt.Scale(type="log"), legend=alt.Legend(gradientLength=90)),
        tooltip=[
            alt.Tooltip("x:Q", title="expected rank from"),
            alt.Tooltip("y:Q", title="rank from"),
            "targets:Q",
            alt.Tooltip("weight:Q", title="mean weight"),
        ],
    )
    corners: list[dict[str, Any]] = [{"x": at, "y": at} for at in (1, short(10**end))]
    line = (
        alt.Chart(alt.InlineData(values=corners))
        .mark_line(strokeDash=[3, 3], color="#D55E00")
        .encode(x="x:Q", y="y:Q")
    )
    return replace(figure, chart=alt.layer(density, line))


def weights(tokens: Tokens) -> Figure:
    """Weight of the targets against their probability: quartiles, in tenths of the targets by probability."""
    figure = Figure(
        "weight-probability",
        "Weight against probability",
        "Medians, in bands from the 25th to the 75th percentile, of twentieths of the targets by probability: "
        "SFT is a line at 1, DFT the diagonal, and where a method leaves them it moves the gradient.",
        missing=_RECORDS,
    )
    if not len(tokens):
        return figure
    p, weight = np.exp(tokens.column("logp")), tokens.column("weight")
    rows: list[dict[str, Any]] = [
        {"p": short(np.median(p[part]))}
        | dict(zip(("low", "mid", "high"), map(short, np.quantile(weight[part], [0.25, 0.5, 0.75])), strict=True))
        for part in parts_of(p, 20)
        if len(part)
    ]
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("p:Q", title="probability of the target", scale=alt.Scale(domain=[0, 1])),
        tooltip=["p:Q", alt.Tooltip("mid:Q", title="median weight")],
    )
    chart = alt.layer(
        base.mark_area(opacity=0.2).encode(y=alt.Y("low:Q", title="weight"), y2="high:Q"),
        base.mark_line(strokeWidth=2, point=True).encode(y=alt.Y("mid:Q")),
    )
    return replace(figure, chart=chart)


def extremes(tokens: pd.DataFrame, most: int) -> dict[str, pd.DataFrame]:
    """The heaviest targets; and the lightest of those that the model does not rank first."""
    ordered = tokens.sort_values("weight", ascending=False, kind="stable")
    behind = ordered[ordered["rank"] > 1]
    return {"Heaviest": ordered.head(most), "Lightest, not ranked first": behind.iloc[::-1].head(most)}
