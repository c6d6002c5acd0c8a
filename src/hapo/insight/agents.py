"""Runs that trained an agent with a critic over the vocabulary: their figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import altair as alt

from .figures import Figure, short
from .token_figures import lengths, positions
from .tokens import Tokens
from .word_figures import dual_entropy, landscape

LOOP_OPTIONS = ("beta", "gamma", "polyak", "lam", "critic", "target")
"""What a page says of the loop, where a run was told other than its defaults."""


def agent_figures(tokens: Tokens) -> list[Figure]:
    """The figures of recorded turns, in the order of a page."""
    return [figure(tokens) for figure in (values, landscape, dual_entropy, lengths, positions)]


def values(tokens: Tokens) -> Figure:
    """Value of the states along a turn, of rewarded and of other turns, in the last recorded update."""
    figure = Figure(
        "values",
        "Value along a turn",
        "Medians of V in the last recorded update, in bands from the 25th to the 75th percentile: where the lines "
        "part, the critic knows how the turn will end.",
        missing="It is made of token records (`record_tokens_every`), and none were found.",
    )
    if not len(tokens):
        return figure
    last = tokens.batch(tokens.rollouts[-1], "reward", "position", "value")
    rows: list[dict[str, Any]] = []
    for kind, some in (("rewarded", last[last["reward"] > 0]), ("other", last[last["reward"] <= 0])):
        quartiles = some.groupby("position")["value"].quantile([0.25, 0.5, 0.75]).unstack()
        rows += [
            {"position": position, "kind": kind, "low": short(low), "mid": short(mid), "high": short(high)}
            for position, low, mid, high in quartiles.itertuples()
        ]
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("position:Q", title="position, tokens", scale=alt.Scale(nice=False)),
        color=alt.Color("kind:N", scale=alt.Scale(domain=["rewarded", "other"]), legend=alt.Legend(title=None)),
        tooltip=["kind:N", "position:Q", alt.Tooltip("mid:Q", title="median V")],
    )
    chart = alt.layer(
        base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q", title="V"), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=alt.Y("mid:Q")),
    )
    return replace(figure, chart=chart)
