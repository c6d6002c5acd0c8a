"""Figures made of the token records of one run: the analyses of the HAPO paper (arXiv 2509.16591), and more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from .figures import Figure, short
from .run import Run

ROLLOUTS = 8
"""Most rollout batches that are read, evenly spaced over the recorded ones, first and last among them."""
LEAST = 5
"""Least occurrences of a token text, or of a stem, that a figure shows."""
FLOOR = 1e-4
"""Entropies below it, nats, are drawn at it."""

_RECORDS = "It is made of token records (`record_tokens_every`), and none were found."


def spread(values: Sequence[int], most: int) -> list[int]:
    """At most so many of the values, evenly spaced, the first and the last among them."""
    index = np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int)
    return [values[i] for i in index]


def analysed(run: Run) -> pd.DataFrame:
    """The recorded tokens that the figures are made of."""
    return pd.concat([run.tokens(first) for first in spread(run.rollouts, ROLLOUTS)] or [run.tokens()])


def token_figures(tokens: pd.DataFrame) -> list[Figure]:
    """The figures of a table of token records, in the order of a page; that of the gates where there are some.

    Of records without entropies, as another trainer's dumps may be, those that read none.
    """
    if len(tokens) and "entropy" not in tokens:
        return [lengths(tokens), signals(tokens)]
    figures = (landscape, dual_entropy, ratios, clipping, lengths, positions, signals, temperatures)
    return [figure(tokens) for figure in (*figures, *([gates] if "gate" in tokens else []))]


def landscape(tokens: pd.DataFrame) -> Figure:
    """Mean entropy of each token text against how often it occurs."""
    figure = Figure(
        "landscape",
        "Entropy and frequency of tokens",
        "A point is a token text: the frequent certain ones carry the form, the uncertain ones (above the line, "
        "the upper fifth of all tokens) are where answers part.",
        missing=_RECORDS if tokens.empty else f"It needs a token text that occurs at least {LEAST} times.",
    )
    if tokens.empty:
        return figure
    texts = tokens.groupby("text")["entropy"].agg(["size", "mean"]).query(f"size >= {LEAST}")
    if texts.empty:
        return figure
    texts = texts.sort_values("size", ascending=False, kind="stable").head(800)
    named = _apart(texts.loc[[*texts.index[:8], *texts["mean"].nlargest(12).index]])
    rows = [
        {"text": visible(t), "count": n, "entropy": short(max(h, FLOOR)), "name": visible(t) if t in named else ""}
        for t, n, h in texts.itertuples()
    ]
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("count:Q", title="occurrences, log scale", scale=_LOG, axis=_powers(0, 9)),
        y=_entropy(alt.Y, "entropy:Q", "mean entropy, nats, log scale"),
    )
    tip = [alt.Tooltip("text:N", title="token"), "count:Q", alt.Tooltip("entropy:Q", title="mean entropy")]
    chart = alt.layer(
        base.mark_point(filled=True, size=40, opacity=0.55).encode(tooltip=tip),
        base.mark_text(align="left", dx=6).encode(text="name:N"),
        _line(max(float(tokens["entropy"].quantile(0.8)), FLOOR)),
    )
    return replace(figure, chart=chart)


def dual_entropy(tokens: pd.DataFrame, most: int = 20) -> Figure:
    """The stems with the widest spread of entropy: certain in one place, uncertain in another."""
    figure = Figure(
        "dual-entropy",
        "The same word, certain here and a fork there",
        "Bars run from the 10th to the 90th percentile of the entropies of a word's tokens, whatever their case "
        "and spaces: a bar that crosses the line is no matter of the word, only of the place.",
        missing=_RECORDS
        if tokens.empty
        else f"No word of at least {LEAST} tokens is among the certain half and the upper fifth by entropy.",
    )
    if tokens.empty:
        return figure
    middle, pivot = tokens["entropy"].quantile([0.5, 0.8])
    stems = tokens.assign(stem=tokens["text"].str.strip().str.casefold())
    grouped = stems.groupby("stem")["entropy"]
    table = grouped.quantile([0.1, 0.5, 0.9]).unstack().set_axis(["low", "mid", "high"], axis=1)
    table["count"] = grouped.size()
    table = table[(table["count"] >= LEAST) & (table["low"] < middle) & (table["high"] > pivot)]
    if table.empty:
        return figure
    floored = table[["low", "high"]].clip(lower=FLOOR)
    table = table.loc[(floored["high"] / floored["low"]).sort_values(ascending=False, kind="stable").index[:most]]
    forms = stems[stems["stem"].isin(table.index)].groupby("stem")["text"].unique()
    rows = [
        {
            "order": order,
            "stem": visible(stem) or "(white space)",
            "forms": "   ".join(visible(form) for form in list(forms[stem])[:8]),
            "count": int(line["count"]),
            **{k: short(max(line[k], FLOOR)) for k in ("low", "mid", "high")},
        }
        for order, (stem, line) in enumerate(table.iterrows())
    ]
    tip = ["stem:N", "forms:N", "count:Q", *(f"{k}:Q" for k in ("low", "mid", "high"))]
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        y=alt.Y("stem:N", title=None, sort=alt.EncodingSortField("order", op="min"), axis=alt.Axis(labelLimit=110))
    )
    x = "entropy, nats, log scale"
    chart = alt.layer(
        base.mark_bar(height=6, cornerRadius=3, opacity=0.45).encode(
            x=_entropy(alt.X, "low:Q", x), x2="high:Q", tooltip=tip
        ),
        base.mark_point(filled=True, size=40, opacity=1).encode(x=_entropy(alt.X, "mid:Q", x), tooltip=tip),
        _line(max(float(pivot), FLOOR), "x"),
    )
    return replace(figure, chart=chart)


def ratios(tokens: pd.DataFrame) -> Figure:
    """Density of log ratio and entropy, with its median and the median clip bounds."""
    figure = Figure(
        "ratio-entropy",
        "Importance ratio against entropy",
        "Ratios move most where the policy is uncertain: bounds that are the same for all tokens (outer lines) "
        "cut there, and hardly touch the certain tokens. The outermost cells hold what lies beyond.",
        missing=_RECORDS
        if tokens.empty
        else "Every recorded ratio is 1: each rollout batch served one optimiser step. It appears with "
        "`steps_per_generation` or `num_iterations` large enough for several.",
    )
    moved = _kept(tokens)
    moved = moved[moved["step"] > moved["rollout"]] if len(moved) else moved
    if moved.empty or np.allclose(moved["ratio"], 1.0, atol=1e-6):
        return figure
    x, y = np.log10(moved["entropy"].clip(lower=FLOOR)), np.log(moved["ratio"].clip(lower=1e-9))
    with np.errstate(divide="ignore"):  # a method without a lower bound has it at 0
        bounds = {"lower bound": np.log(1 - moved["bound_low"]), "upper bound": np.log1p(moved["bound_high"])}
    reach = max(float(y.abs().quantile(0.999)), 1e-3)
    count, xs, ys = np.histogram2d(x, y.clip(-reach, reach), bins=(32, 27))
    cells = [
        {"x": short(10 ** xs[i]), "x2": short(10 ** xs[i + 1]), "y": short(ys[j]), "y2": short(ys[j + 1])}
        | {"tokens": int(count[i, j])}
        for i, j in zip(*count.nonzero(), strict=True)
    ]
    place = np.clip(np.digitize(x, xs[::2]) - 1, 0, 15)
    lines = [
        {"x": short(10 ** (xs[2 * i] + xs[1] - xs[0])), "y": short(value), "line": name}
        for name, values in {"median": y, **bounds}.items()
        for i, value in values.groupby(place).median().items()
        if np.isfinite(value) and abs(value) <= 1.5 * reach
    ]
    axis = "log ratio, nats"
    density = alt.Chart(alt.InlineData(values=cells)).mark_rect()
    density = density.encode(
        x=_entropy(alt.X, "x:Q", "entropy, nats, log scale"),
        x2="x2:Q",
        y=alt.Y("y:Q", title=axis),
        y2="y2:Q",
        color=alt.Color("tokens:Q", scale=alt.Scale(type="log"), legend=alt.Legend(gradientLength=90)),
        tooltip=[alt.Tooltip("x:Q", title="entropy from"), alt.Tooltip("y:Q", title=axis), "tokens:Q"],
    )
    names = ["median", "lower bound", "upper bound"]
    below = alt.Legend(title=None, orient="bottom")
    dash = alt.StrokeDash("line:N", scale=alt.Scale(domain=names, range=[[1, 0], [4, 3], [2, 2]]), legend=below)
    over = alt.Chart(alt.InlineData(values=lines)).mark_line(strokeWidth=2, color="#D55E00")
    return replace(figure, chart=alt.layer(density, over.encode(x="x:Q", y="y:Q", strokeDash=dash)))


def clipping(tokens: pd.DataFrame) -> Figure:
    """Share of tokens at each clip bound, by decile of entropy."""
    figure = Figure(
        "clipping",
        "Who meets a clip bound",
        "Share of the tokens of each tenth by entropy, the most certain first: with bounds that are the same for "
        "all it rises to the right, where the exploring tokens are.",
        missing=_RECORDS if tokens.empty else "No recorded token met a clip bound.",
    )
    kept = _kept(tokens)
    if kept.empty or not kept["clipped"].any():
        return figure
    tenth = (kept["entropy"].rank(method="first").sub(1) * 10 // len(kept)).astype(int) + 1
    rows = []
    for n, group in kept.groupby(tenth):
        low, high = short(group["entropy"].min()), short(group["entropy"].max())
        for bound, side in (("low", group["ratio"] < 1), ("high", group["ratio"] > 1)):
            share = short((group["clipped"] & side).mean())
            rows.append({"tenth": n, "bound": bound, "share": share, "range": f"{low} to {high} nats"})
    chart = alt.Chart(alt.InlineData(values=rows)).mark_bar()
    return replace(
        figure,
        chart=chart.encode(
            x=alt.X("tenth:O", title="tenth by entropy", axis=alt.Axis(labelAngle=0)),
            xOffset=alt.XOffset("bound:N", sort=["low", "high"]),
            y=alt.Y("share:Q", title="clipped share of tokens", axis=alt.Axis(format="~%")),
            color=_kinds("bound:N", ["low", "high"], "square"),
            tooltip=["tenth:O", "range:N", "bound:N", "share:Q"],
        ),
    )


def lengths(tokens: pd.DataFrame) -> Figure:
    """Lengths of right and of wrong responses."""
    figure = Figure(
        "lengths",
        "Length of right and wrong responses",
        "Each outline is a distribution of its own: where wrong answers are the longer ones, a token mean lets "
        "them weigh more than a mean of responses would.",
        missing=_RECORDS,
    )
    if tokens.empty:
        return figure
    responses = tokens.groupby(["rollout", "response", "step"]).agg(
        n=("position", "size"), good=("verdict", "first")
    )
    edges = np.linspace(responses["n"].min(), responses["n"].max() + 1, 31 if responses["n"].max() > 30 else 11)
    rows = []
    for kind, some in (("right", responses[responses["good"] > 0]), ("wrong", responses[responses["good"] <= 0])):
        if len(some):
            share = np.histogram(some["n"], edges)[0] / len(some)
            median = f"{some['n'].median():g} tokens in {len(some)} responses"
            for n, value in zip(edges, [*share, share[-1]], strict=True):
                rows.append({"length": short(n), "share": short(value), "kind": kind, "median": median})
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("length:Q", title="tokens", scale=alt.Scale(nice=False, zero=False)),
        y=alt.Y("share:Q", title="share of responses", stack=None, axis=alt.Axis(format="~%")),
        color=_kinds("kind:N", ["right", "wrong"]),
        tooltip=["kind:N", "median:N"],
    )
    return replace(figure, chart=base.mark_area(interpolate="step-after", opacity=0.3, line={"strokeWidth": 2}))


def positions(tokens: pd.DataFrame) -> Figure:
    """Median entropy along the response, at the start, in the middle and at the end of training."""
    figure = Figure(
        "positions",
        "Entropy along the response",
        "Medians, in bands from the 25th to the 75th percentile, as far as a twentieth of the responses reach: "
        "where in an answer the policy decides, and whether training takes its choice away.",
        missing=_RECORDS,
    )
    if tokens.empty:
        return figure
    width = max(1, -(-(int(tokens["position"].max()) + 1) // 60))
    rows, names = [], []
    for first in spread(sorted(tokens["rollout"].unique()), 3):
        names.append(f"step {first}")
        some = tokens[tokens["rollout"] == first]
        quartiles = (
            some.groupby(some["position"] // width * width)["entropy"].quantile([0.25, 0.5, 0.75]).unstack()
        )
        for position, *values in quartiles.itertuples():
            drawn = {k: short(v) for k, v in zip(("low", "mid", "high"), values, strict=True)}
            rows.append({"position": position, "step": names[-1], **drawn})
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("position:Q", title="position, tokens", scale=alt.Scale(nice=False)),
        color=_kinds("step:N", names),
        tooltip=["step:N", "position:Q", alt.Tooltip("mid:Q", title="median entropy")],
    )
    chart = alt.layer(
        base.mark_area(opacity=0.13).encode(y=alt.Y("low:Q", title="entropy, nats"), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=alt.Y("mid:Q")),
    )
    return replace(figure, chart=chart)


def signals(tokens: pd.DataFrame) -> Figure:
    """Histogram of the method's signal."""
    figure = Figure(
        "signal",
        "Signal of the method",
        "HAPO's h: above 0 a token counts as uncertain and may explore, below 0 as certain; at its rho of 0.8 "
        "a fifth lies above.",
        missing=_RECORDS if tokens.empty else "The method gives tokens no number (HAPO, Archer and others do).",
    )
    values = tokens["signal"].dropna() if "signal" in tokens else pd.Series(dtype=float)
    if values.empty:
        return figure
    edges = np.linspace(min(values.min(), -1.0), max(values.max(), 1.0), 41)
    share = np.histogram(values, edges)[0] / len(values)
    rows = [
        {"from": short(a), "to": short(b), "share": short(s)}
        for a, b, s in zip(edges, edges[1:], share, strict=False)
    ]
    chart = alt.Chart(alt.InlineData(values=rows)).mark_bar()
    return replace(
        figure,
        chart=chart.encode(
            x=alt.X("from:Q", title="signal", bin="binned"),
            x2="to:Q",
            y=alt.Y("share:Q", title="share of tokens", axis=alt.Axis(format="~%")),
            tooltip=["from:Q", "to:Q", "share:Q"],
        ),
    )


def gates(tokens: pd.DataFrame) -> Figure:
    """Histogram of the tokens' mean gates, of the first, a middle and the last recorded rollout batch."""
    figure = Figure(
        "gates",
        "Gates of the adapter",
        "A token's mean over the gates of all adapted layers: at 0 the adapter leaves it alone, at 1 it acts in "
        "full. The entropy of the gates in the loss drives them apart.",
    )
    edges, rows, names = np.linspace(0, 1, 41), [], []
    for first in spread(sorted(tokens["rollout"].unique()), 3):
        names.append(f"step {first}")
        some = tokens.loc[tokens["rollout"] == first, "gate"]
        for a, share in zip(edges, np.histogram(some, edges)[0] / len(some), strict=False):
            rows.append({"gate": short(a + edges[1] / 2), "share": short(share), "step": names[-1]})
    chart = alt.Chart(alt.InlineData(values=rows)).mark_area(interpolate="step", opacity=0.3, line=True)
    return replace(
        figure,
        chart=chart.encode(
            x=alt.X("gate:Q", title="mean gate", scale=alt.Scale(domain=[0, 1])),
            y=alt.Y("share:Q", title="share of tokens", stack=None, axis=alt.Axis(format="~%")),
            color=_kinds("step:N", names),
            tooltip=["step:N", "gate:Q", "share:Q"],
        ),
    )


def temperatures(tokens: pd.DataFrame) -> Figure:
    """Temperature that tokens were drawn at, against their entropy."""
    figure = Figure(
        "temperature-entropy",
        "Temperature against entropy",
        "A point is a token: certain ones are drawn colder, uncertain ones hotter; the curve moves with the "
        "statistics of the rollout batch before.",
        missing=_RECORDS
        if tokens.empty
        else "It appears with a method that adapts the temperature (HAPO with component A), from its second "
        "recorded rollout batch.",
    )
    if "temperature" not in tokens:
        return figure
    drawn = tokens[tokens.groupby("rollout")["temperature"].transform("nunique") > 1]
    if drawn.empty:
        return figure
    rows, names = [], []
    for first in spread(sorted(drawn["rollout"].unique()), 3):
        names.append(f"step {first}")
        some = drawn[drawn["rollout"] == first].sort_values("entropy", kind="stable")
        for i in spread(range(len(some)), 200):
            h, t = some["entropy"].iat[i], some["temperature"].iat[i]
            rows.append({"entropy": short(max(h, FLOOR)), "temperature": short(t), "step": names[-1]})
    chart = alt.Chart(alt.InlineData(values=rows)).mark_point(filled=True, size=16, opacity=0.6)
    return replace(
        figure,
        chart=chart.encode(
            x=_entropy(alt.X, "entropy:Q", "entropy, nats, log scale"),
            y=alt.Y("temperature:Q", scale=alt.Scale(zero=False)),
            color=_kinds("step:N", names, "circle"),
            tooltip=["step:N", "entropy:Q", "temperature:Q"],
        ),
    )


def visible(text: str, most: int = 40, *, marks: bool = True, tail: bool = False) -> str:
    """A text for readers: cut to its first, or last, `most` characters, its control characters shown.

    White space becomes a sign with `marks`, else blanks. Characters that do not print, such as those which turn
    the direction of writing, are written as their escapes.
    """
    cut = text[-most:] if tail else text[:most]
    signs = {" ": "␣", "\n": "↵", "\t": "⇥"} if marks else {" ": " ", "\n": " ", "\t": " "}
    shown = "".join(signs.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in cut)
    if len(cut) == len(text):
        return shown
    return f"…{shown}" if tail else f"{shown}…"


def _apart(texts: pd.DataFrame) -> set[str]:
    """Of the texts, in their order, those whose names would not lie upon one another."""
    places = np.log(texts[["size", "mean"]].clip(lower=FLOOR))
    places = (places - places.min()) / (places.max() - places.min()).clip(lower=1e-9)
    chosen: dict[str, tuple[float, float]] = {}
    for text, x, y in places.itertuples():
        if all(abs(x - there) > 0.15 or abs(y - high) > 0.06 for there, high in chosen.values()):
            chosen[text] = (x, y)
    return set(chosen)


def _kept(tokens: pd.DataFrame) -> pd.DataFrame:
    return tokens[tokens["kept"] & tokens["ratio"].notna()] if len(tokens) else tokens


_LOG = alt.Scale(type="log", nice=False, padding=8)


def _entropy(channel: type[alt.X] | type[alt.Y], shorthand: str, title: str) -> Any:
    return channel(shorthand, title=title, scale=_LOG, axis=_powers(-4, 2))


def _powers(low: int, high: int) -> alt.Axis:
    return alt.Axis(values=[m * 10.0**k for k in range(low, high) for m in (1, 2, 5)], format="~g")


def _kinds(shorthand: str, names: list[str], symbol: str = "stroke") -> alt.Color:
    key = alt.Legend(title=None, symbolType=symbol, symbolStrokeWidth=3 if symbol == "stroke" else 0)
    return alt.Color(shorthand, legend=key, scale=alt.Scale(domain=names))


def _line(at: float, axis: str = "y") -> alt.Chart:
    rule = alt.Chart(alt.InlineData(values=[{"at": short(at)}])).mark_rule(strokeDash=[3, 3])
    return rule.encode(**{axis: "at:Q"})
