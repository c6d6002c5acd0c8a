"""Figures of the texts of recorded tokens: how often and how uncertain, and where one is both."""

from __future__ import annotations

from dataclasses import replace

import altair as alt
import numpy as np
import pandas as pd

from .figures import FLOOR, LOG, NO_RECORDS, Figure, entropy_channel, powers, rule_at, short, visible
from .tokens import Tokens, quantiles_by

LEAST = 5
"""Least occurrences of a token text, or of a stem, that a figure shows."""


def landscape(tokens: Tokens) -> Figure:
    """Mean entropy of each token text against how often it occurs."""
    figure = Figure(
        "landscape",
        "Entropy and frequency of tokens",
        "A point is a token text: the frequent certain ones carry the form, the uncertain ones (above the line, "
        "the upper fifth of all tokens) are where answers part.",
        missing=NO_RECORDS if not len(tokens) else f"It needs a token text that occurs at least {LEAST} times.",
    )
    if not len(tokens):
        return figure
    found = [
        batch.astype({"entropy": float}).groupby("text", observed=True)["entropy"].agg(["size", "sum"])
        for batch in tokens.batches("text", "entropy")
    ]
    texts = pd.concat([some.set_axis(some.index.astype(str)) for some in found]).groupby(level=0).sum()
    texts = texts.assign(mean=texts.pop("sum") / texts["size"]).query(f"size >= {LEAST}")
    if texts.empty:
        return figure
    texts = texts.sort_values("size", ascending=False, kind="stable").head(800)
    named = _apart(texts.loc[[*texts.index[:8], *texts["mean"].nlargest(12).index]])
    rows = [
        {"text": visible(t), "count": n, "entropy": short(max(h, FLOOR)), "name": visible(t) if t in named else ""}
        for t, n, h in texts.itertuples()
    ]
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("count:Q", title="occurrences, log scale", scale=LOG, axis=powers(0, 9)),
        y=entropy_channel(alt.Y, "entropy:Q", "mean entropy, nats, log scale"),
    )
    tip = [alt.Tooltip("text:N", title="token"), "count:Q", alt.Tooltip("entropy:Q", title="mean entropy")]
    chart = alt.layer(
        base.mark_point(filled=True, size=40, opacity=0.55).encode(tooltip=tip),
        base.mark_text(align="left", dx=6).encode(text="name:N"),
        rule_at(max(float(np.nanquantile(tokens.column("entropy"), 0.8)), FLOOR)),
    )
    return replace(figure, chart=chart)


def dual_entropy(tokens: Tokens, most: int = 20) -> Figure:
    """The stems with the widest spread of entropy: certain in one place, uncertain in another."""
    figure = Figure(
        "dual-entropy",
        "The same word, certain here and a fork there",
        "Bars run from the 10th to the 90th percentile of the entropies of a word's tokens, whatever their case "
        "and spaces: a bar that crosses the line is no matter of the word, only of the place.",
        missing=NO_RECORDS
        if not len(tokens)
        else f"No word of at least {LEAST} tokens is among the certain half and the upper fifth by entropy.",
    )
    if not len(tokens):
        return figure
    middle, pivot = np.nanquantile(tokens.column("entropy"), [0.5, 0.8])
    numbers: dict[str, int] = {}
    forms: dict[int, dict[str, None]] = {}
    table = quantiles_by(
        (
            (_stems(batch["text"], numbers, forms), batch["entropy"].to_numpy())
            for batch in tokens.batches("text", "entropy")
        ),
        len(tokens),
        [0.1, 0.5, 0.9],
    )
    table = table.set_axis(["count", "low", "mid", "high"], axis=1)
    table = table.assign(stem=np.array([*numbers], object)[table.index]).sort_values("stem")
    table = table[(table["count"] >= LEAST) & (table["low"] < middle) & (table["high"] > pivot)]
    if table.empty:
        return figure
    floored = table[["low", "high"]].clip(lower=FLOOR)
    table = table.loc[(floored["high"] / floored["low"]).sort_values(ascending=False, kind="stable").index[:most]]
    rows = [
        {
            "order": order,
            "stem": visible(line["stem"]) or "(white space)",
            "forms": "   ".join(visible(form) for form in list(forms[number])[:8]),
            "count": int(line["count"]),
            **{k: short(max(line[k], FLOOR)) for k in ("low", "mid", "high")},
        }
        for order, (number, line) in enumerate(table.iterrows())
    ]
    tip = ["stem:N", "forms:N", "count:Q", *(f"{k}:Q" for k in ("low", "mid", "high"))]
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        y=alt.Y("stem:N", title=None, sort=alt.EncodingSortField("order", op="min"), axis=alt.Axis(labelLimit=110))
    )
    x = "entropy, nats, log scale"
    chart = alt.layer(
        base.mark_bar(height=6, cornerRadius=3, opacity=0.45).encode(
            x=entropy_channel(alt.X, "low:Q", x), x2="high:Q", tooltip=tip
        ),
        base.mark_point(filled=True, size=40, opacity=1).encode(x=entropy_channel(alt.X, "mid:Q", x), tooltip=tip),
        rule_at(max(float(pivot), FLOOR), "x"),
    )
    return replace(figure, chart=chart)


def _apart(texts: pd.DataFrame) -> set[str]:
    """Of the texts, in their order, those whose names would not lie upon one another."""
    places = np.log(texts[["size", "mean"]].clip(lower=FLOOR))
    places = (places - places.min()) / (places.max() - places.min()).clip(lower=1e-9)
    chosen: dict[str, tuple[float, float]] = {}
    for text, x, y in places.itertuples():
        if all(abs(x - there) > 0.15 or abs(y - high) > 0.06 for there, high in chosen.values()):
            chosen[text] = (x, y)
    return set(chosen)


def _stems(texts: pd.Series, numbers: dict[str, int], forms: dict[int, dict[str, None]]) -> np.ndarray:
    """Number of the stem of each text; new stems, and forms in the order of the texts, are put into the tables."""
    texts = texts.astype("category")
    every = texts.cat.categories
    stems = every.str.strip().str.casefold()
    table = np.array([numbers.setdefault(stem, len(numbers)) for stem in stems])
    written = every.to_numpy(object)  # a text of an index of Arrow's takes ten times as long
    for place in texts.cat.codes.drop_duplicates():
        forms.setdefault(int(table[place]), {})[written[place]] = None
    return table[texts.cat.codes]
