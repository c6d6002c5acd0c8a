"""Figures made of the token records of one run: the analyses of the HAPO paper (arXiv 2509.16591), and more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from .figures import Figure, short
from .run import Run
from .tokens import Tokens, gather, parts_of, quantiles_by

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


def analysed(run: Run) -> Tokens:
    """The recorded tokens that the figures are made of."""
    read = spread(run.rollouts, ROLLOUTS)
    return Tokens({first: run.count(first) for first in read}, run.columns(read), run.tokens)


def token_figures(tokens: Tokens) -> list[Figure]:
    """The figures of recorded tokens, in the order of a page; that of the gates where there are some.

    Of records without entropies, as another trainer's dumps may be, those that read none.
    """
    if len(tokens) and "entropy" not in tokens:
        return [lengths(tokens), signals(tokens)]
    figures = (landscape, dual_entropy, ratios, clipping, lengths, positions, signals, temperatures)
    return [figure(tokens) for figure in (*figures, *([gates] if "gate" in tokens else []))]


def landscape(tokens: Tokens) -> Figure:
    """Mean entropy of each token text against how often it occurs."""
    figure = Figure(
        "landscape",
        "Entropy and frequency of tokens",
        "A point is a token text: the frequent certain ones carry the form, the uncertain ones (above the line, "
        "the upper fifth of all tokens) are where answers part.",
        missing=_RECORDS if not len(tokens) else f"It needs a token text that occurs at least {LEAST} times.",
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
        x=alt.X("count:Q", title="occurrences, log scale", scale=_LOG, axis=_powers(0, 9)),
        y=_entropy(alt.Y, "entropy:Q", "mean entropy, nats, log scale"),
    )
    tip = [alt.Tooltip("text:N", title="token"), "count:Q", alt.Tooltip("entropy:Q", title="mean entropy")]
    chart = alt.layer(
        base.mark_point(filled=True, size=40, opacity=0.55).encode(tooltip=tip),
        base.mark_text(align="left", dx=6).encode(text="name:N"),
        _line(max(float(np.nanquantile(tokens.column("entropy"), 0.8)), FLOOR)),
    )
    return replace(figure, chart=chart)


def dual_entropy(tokens: Tokens, most: int = 20) -> Figure:
    """The stems with the widest spread of entropy: certain in one place, uncertain in another."""
    figure = Figure(
        "dual-entropy",
        "The same word, certain here and a fork there",
        "Bars run from the 10th to the 90th percentile of the entropies of a word's tokens, whatever their case "
        "and spaces: a bar that crosses the line is no matter of the word, only of the place.",
        missing=_RECORDS
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
            x=_entropy(alt.X, "low:Q", x), x2="high:Q", tooltip=tip
        ),
        base.mark_point(filled=True, size=40, opacity=1).encode(x=_entropy(alt.X, "mid:Q", x), tooltip=tip),
        _line(max(float(pivot), FLOOR), "x"),
    )
    return replace(figure, chart=chart)


def ratios(tokens: Tokens) -> Figure:
    """Density of log ratio and entropy, with its median and the median clip bounds."""
    figure = Figure(
        "ratio-entropy",
        "Importance ratio against entropy",
        "Ratios move most where the policy is uncertain: bounds that are the same for all tokens (outer lines) "
        "cut there, and hardly touch the certain tokens. The outermost cells hold what lies beyond.",
        missing=_RECORDS
        if not len(tokens)
        else "Every recorded ratio is 1: each rollout batch served one optimiser step. It appears with "
        "`steps_per_generation` or `num_iterations` large enough for several.",
    )

    points = gather((_placed(batch) for batch in _moved(tokens, "entropy", "ratio")), (len(tokens), 2), np.float32)
    if np.abs(points[:, 1]).max(initial=0) < 1.1e-5:  # or there is none
        return figure
    reach = max(float(np.quantile(np.abs(points[:, 1]), 0.999)), 1e-3)
    points[:, 1].clip(-reach, reach, out=points[:, 1])
    edges = [
        np.linspace(low, high, n + 1) for low, high, n in zip(points.min(0), points.max(0), (32, 27), strict=True)
    ]
    count = np.zeros((32, 27))
    for some in np.array_split(points, len(points) // 2**20 + 1):
        count += np.histogramdd(some, edges)[0]
    del points
    xs, ys = edges
    cells = [
        {"x": short(10 ** xs[i]), "x2": short(10 ** xs[i + 1]), "y": short(ys[j]), "y2": short(ys[j + 1])}
        | {"tokens": int(count[i, j])}
        for i, j in zip(*count.nonzero(), strict=True)
    ]
    lines = [
        {"x": short(10 ** (xs[2 * i] + xs[1] - xs[0])), "y": short(value), "line": name}
        for name, column in {"median": "ratio", "lower bound": "bound_low", "upper bound": "bound_high"}.items()
        for i, value in _medians(tokens, column, xs[::2]).items()
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


def _moved(tokens: Tokens, *columns: str) -> Iterator[pd.DataFrame]:
    """Tokens of the second and later updates of their rollout batches."""
    for batch in _kept(tokens, "step", "rollout", *columns):
        yield batch[batch["step"] > batch["rollout"]]


def _placed(batch: pd.DataFrame) -> np.ndarray:
    """Common logarithm of the entropy and log ratio of each token."""
    x, y = np.log10(batch["entropy"].clip(lower=FLOOR)), np.log(batch["ratio"].clip(lower=1e-9))
    return np.stack([x, y], 1)


def _medians(tokens: Tokens, column: str, edges: np.ndarray) -> pd.Series:
    """Of the log ratio, or the log of what a bound lets it be, between these common logarithms of entropy."""
    of: Callable[[np.ndarray], np.ndarray] = {
        "ratio": lambda x: np.log(x.clip(1e-9)),
        "bound_low": lambda x: np.log(1 - x),
        "bound_high": np.log1p,
    }[column]
    with np.errstate(divide="ignore"):  # a method without a lower bound has it at 0
        parts = (
            (
                np.clip(np.digitize(_placed(batch)[:, 0], edges) - 1, 0, len(edges) - 2),
                of(batch[column].to_numpy()),
            )
            for batch in _moved(tokens, "entropy", column)
        )
        return quantiles_by(parts, len(tokens), [0.5])[0.5]


def clipping(tokens: Tokens) -> Figure:
    """Share of tokens at each clip bound, by decile of entropy."""
    figure = Figure(
        "clipping",
        "Who meets a clip bound",
        "Share of the tokens of each tenth by entropy, the most certain first: with bounds that are the same for "
        "all it rises to the right, where the exploring tokens are.",
        missing=_RECORDS if not len(tokens) else "No recorded token met a clip bound.",
    )
    sides = gather((_sides(batch) for batch in _kept(tokens, "clipped")), (len(tokens), 2), bool)
    if not sides.any():
        return figure
    entropy = gather((batch["entropy"] for batch in _kept(tokens, "entropy")), len(tokens), np.float32)
    rows = []
    for number, places in enumerate(parts_of(entropy, 10), 1):
        if len(places):
            ends = " to ".join(f"{short(entropy[places[i]])}" for i in (0, -1))
            for bound, share in zip(("low", "high"), sides[places].mean(0), strict=True):
                rows.append({"tenth": number, "bound": bound, "share": short(share), "range": f"{ends} nats"})
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


def _sides(batch: pd.DataFrame) -> np.ndarray:
    """Whether each token was clipped at the lower, and at the upper bound."""
    return np.stack([batch["clipped"] & (batch["ratio"] < 1), batch["clipped"] & (batch["ratio"] > 1)], 1)


def lengths(tokens: Tokens) -> Figure:
    """Lengths of right and of wrong responses."""
    figure = Figure(
        "lengths",
        "Length of right and wrong responses",
        "Each outline is a distribution of its own: where wrong answers are the longer ones, a token mean lets "
        "them weigh more than a mean of responses would.",
        missing=_RECORDS,
    )
    if not len(tokens):
        return figure
    responses = pd.concat(
        batch.groupby(["response", "step"]).agg(n=("verdict", "size"), good=("verdict", "first"))
        for batch in tokens.batches("response", "step", "verdict")
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


def positions(tokens: Tokens) -> Figure:
    """Median entropy along the response, at the start, in the middle and at the end of training."""
    figure = Figure(
        "positions",
        "Entropy along the response",
        "Medians, in bands from the 25th to the 75th percentile, as far as a twentieth of the responses reach: "
        "where in an answer the policy decides, and whether training takes its choice away.",
        missing=_RECORDS,
    )
    if not len(tokens):
        return figure
    width = max(1, -(-(max(int(batch["position"].max()) for batch in tokens.batches("position")) + 1) // 60))
    rows, names = [], []
    for first in spread(tokens.rollouts, 3):
        names.append(f"step {first}")
        some = tokens.batch(first, "position", "entropy")
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


def signals(tokens: Tokens) -> Figure:
    """Histogram of the method's signal."""
    figure = Figure(
        "signal",
        "Signal of the method",
        "HAPO's h: above 0 a token counts as uncertain and may explore, below 0 as certain; at its rho of 0.8 "
        "a fifth lies above.",
        missing=_RECORDS if not len(tokens) else "The method gives tokens no number (HAPO, Archer and others do).",
    )
    batches = (batch["signal"].dropna() for batch in tokens.batches("signal") if "signal" in tokens)
    values = gather(batches, len(tokens), np.float32)
    if not len(values):
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


def gates(tokens: Tokens) -> Figure:
    """Histogram of the tokens' mean gates, of the first, a middle and the last recorded rollout batch."""
    figure = Figure(
        "gates",
        "Gates of the adapter",
        "A token's mean over the gates of all adapted layers: at 0 the adapter leaves it alone, at 1 it acts in "
        "full. The entropy of the gates in the loss drives them apart.",
    )
    edges, rows, names = np.linspace(0, 1, 41), [], []
    for first in spread(tokens.rollouts, 3):
        names.append(f"step {first}")
        some = tokens.batch(first, "gate")["gate"]
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


def temperatures(tokens: Tokens) -> Figure:
    """Temperature that tokens were drawn at, against their entropy."""
    figure = Figure(
        "temperature-entropy",
        "Temperature against entropy",
        "A point is a token: certain ones are drawn colder, uncertain ones hotter; the curve moves with the "
        "statistics of the rollout batch before.",
        missing=_RECORDS
        if not len(tokens)
        else "It appears with a method that adapts the temperature (HAPO with component A), from its second "
        "recorded rollout batch.",
    )
    if "temperature" not in tokens:
        return figure
    adapted = [
        first for first in tokens.rollouts if tokens.batch(first, "temperature")["temperature"].nunique() > 1
    ]
    rows, names = [], []
    for first in spread(adapted, 3):
        names.append(f"step {first}")
        some = tokens.batch(first, "entropy", "temperature").sort_values("entropy", kind="stable")
        for i in spread(range(len(some)), 200):
            h, t = some["entropy"].iat[i], some["temperature"].iat[i]
            rows.append({"entropy": short(max(h, FLOOR)), "temperature": short(t), "step": names[-1]})
    if not rows:
        return figure
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


def _kept(tokens: Tokens, *columns: str) -> Iterator[pd.DataFrame]:
    """These columns and the ratio, of tokens that the method keeps in the loss."""
    for batch in tokens.batches("kept", "ratio", *columns):
        yield batch[batch["kept"] & batch["ratio"].notna()]


def _stems(texts: pd.Series, numbers: dict[str, int], forms: dict[int, dict[str, None]]) -> np.ndarray:
    """Number of the stem of each text; new stems, and forms in the order of the texts, are put into the tables."""
    texts = texts.astype("category")
    every = texts.cat.categories
    stems = every.str.strip().str.casefold()
    table = np.array([numbers.setdefault(stem, len(numbers)) for stem in stems])
    for place in texts.cat.codes.drop_duplicates():
        forms.setdefault(int(table[place]), {})[every[place]] = None
    return table[texts.cat.codes]


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
