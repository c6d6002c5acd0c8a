"""The figure of masked-diffusion rollouts: in which order the tokens of a response were drawn."""

from __future__ import annotations

from dataclasses import replace

import altair as alt

from .figures import Figure, short
from .token_figures import spread
from .tokens import Tokens

COLUMNS = 60
"""Most columns of positions."""


def unmasking(tokens: Tokens) -> Figure:
    """Forward pass that drew the tokens at each position, at the start, in the middle and at the end of a run."""
    figure = Figure(
        "unmasking",
        "Order of unmasking",
        "Means, in bands from the 25th to the 75th percentile: a line that rises is writing from left to right, a "
        "falling one from right to left, a wide band an order that each response chooses.",
        missing="Every recorded response had ended before its first forward pass.",
    )
    batches = (batch.dropna(subset="unmasked") for batch in tokens.batches("unmasked", "position"))
    last = {
        first: int(batch["position"].max())
        for first, batch in zip(tokens.rollouts, batches, strict=True)
        if len(batch)
    }
    if not last:
        return figure
    width = -(-(max(last.values()) + 1) // COLUMNS)
    rows, names = [], []
    for first in spread(list(last), 3):
        names.append(f"step {first}")
        some = tokens.batch(first, "unmasked", "confidence", "position").dropna(subset="unmasked")
        places = some.groupby(some["position"] // width * width)
        table = places["unmasked"].quantile([0.25, 0.75]).unstack().set_axis(["low", "high"], axis=1)
        table = table.assign(mean=places["unmasked"].mean(), confidence=places["confidence"].mean())
        for position, row in table.iterrows():
            rows.append({"position": position, "step": names[-1], **{k: short(v) for k, v in row.items()}})
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("position:Q", title="position, tokens", scale=alt.Scale(nice=False)),
        color=alt.Color(
            "step:N", legend=alt.Legend(title=None, symbolType="stroke"), scale=alt.Scale(domain=names)
        ),
        tooltip=[
            *("step:N", "position:Q", alt.Tooltip("mean:Q", title="forward pass, mean")),
            alt.Tooltip("confidence:Q", title="confidence, mean"),
        ],
    )
    chart = alt.layer(
        base.mark_area(opacity=0.13).encode(y=alt.Y("low:Q", title="forward pass"), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=alt.Y("mean:Q")),
    )
    return replace(figure, chart=chart)
