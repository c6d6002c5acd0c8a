"""Figures made of the token records of one run: the analyses of the HAPO paper (arXiv 2509.16591), and more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import altair as alt
import numpy as np
import pandas as pd

from .figures import FLOOR, NO_RECORDS, Figure, entropy_channel, kinds, short
from .run import Run
from .tokens import Tokens, gather, parts_of, quantiles_by
from .word_figures import dual_entropy, landscape

ROLLOUTS = 8
"""Most rollout batches that are read, evenly spaced over the recorded ones, first and last among them."""


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


def ratios(tokens: Tokens) -> Figure:
    """Density of log ratio and entropy, with its median and the median clip bounds."""
    figure = Figure(
        "ratio-entropy",
        "Importance ratio against entropy",
        "Ratios move most where the policy is uncertain: bounds that are the same for all tokens (outer lines) "
        "cut there, and hardly touch the certain tokens. The outermost cells hold what lies beyond.",
        missing=NO_RECORDS
        if not len(tokens)
        else "Every recorded ratio is 1: each rollout batch served one optimiser step. It appears with "
        "`steps_per_generation` or `num_iterations` large enough for several.",
    )

    moved: list[np.ndarray] = []  # of each rollout batch, which of its tokens
    points = gather(_placed(tokens, moved), (len(tokens), 2), np.float32)
    if np.abs(points[:, 1]).max(initial=0) < 1.1e-5:  # or there is none
        return figure
    reach = max(float(np.quantile(np.abs(points[:, 1]), 0.999)), 1e-3)
    beyond = np.array([[-np.inf, -reach], [np.inf, reach]], np.float32)
    ends = np.clip([points.min(0), points.max(0)], *beyond)
    xs, ys = (np.linspace(low, high, n + 1) for (low, high), n in zip(ends.T, (32, 27), strict=True))
    count = np.zeros((32, 27))
    for some in np.array_split(points, len(points) // 2**20 + 1):
        count += np.histogramdd(some.clip(*beyond), [xs, ys])[0]
    cells = [
        {"x": short(10 ** xs[i]), "x2": short(10 ** xs[i + 1]), "y": short(ys[j]), "y2": short(ys[j + 1])}
        | {"tokens": int(count[i, j])}
        for i, j in zip(*count.nonzero(), strict=True)
    ]
    places = np.clip(np.digitize(points[:, 0], xs[::2]) - 1, 0, 15).astype(np.uint8)
    medians = {"median": quantiles_by([(places, points[:, 1])], len(points), [0.5])[0.5]}
    del points
    for name, column in {"lower bound": "bound_low", "upper bound": "bound_high"}.items():
        parts = _bounds(tokens, column, places, moved)
        medians[name] = quantiles_by(parts, len(places), [0.5])[0.5]
    lines = [
        {"x": short(10 ** (xs[2 * i] + xs[1] - xs[0])), "y": short(value), "line": name}
        for name, of in medians.items()
        for i, value in of.items()
        if np.isfinite(value) and abs(value) <= 1.5 * reach
    ]
    axis = "log ratio, nats"
    density = alt.Chart(alt.InlineData(values=cells)).mark_rect()
    density = density.encode(
        x=entropy_channel(alt.X, "x:Q", "entropy, nats, log scale"),
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


def _placed(tokens: Tokens, moved: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Common logarithm of the entropy and log ratio of tokens in the loss, of second and later updates.

    Which tokens of each rollout batch these are is put into `moved`.
    """
    for batch in tokens.batches("kept", "ratio", "step", "rollout", "entropy"):
        moved.append((_kept(batch) & (batch["step"] > batch["rollout"])).to_numpy())
        some = batch[moved[-1]]
        x, y = np.log10(some["entropy"].clip(lower=FLOOR)), np.log(some["ratio"].clip(lower=1e-9))
        yield np.stack([x, y], 1)


def _bounds(
    tokens: Tokens, column: str, places: np.ndarray, moved: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The places of the tokens that moved, and the log of what a bound lets their ratios be."""
    ends = np.cumsum([some.sum() for some in moved])
    of = np.log1p if column == "bound_high" else lambda x: np.log(1 - x)
    for batch, some, at in zip(tokens.batches(column), moved, np.split(places, ends[:-1]), strict=True):
        with np.errstate(divide="ignore"):  # a method without a lower bound has it at 0
            yield at, of(batch[column].to_numpy()[some])


def clipping(tokens: Tokens) -> Figure:
    """Share of tokens at each clip bound, by decile of entropy."""
    figure = Figure(
        "clipping",
        "Who meets a clip bound",
        "Share of the tokens of each tenth by entropy, the most certain first: with bounds that are the same for "
        "all it rises to the right, where the exploring tokens are.",
        missing=NO_RECORDS if not len(tokens) else "No recorded token met a clip bound.",
    )
    entropies: list[np.ndarray] = []
    sides = gather(_sides(tokens, entropies), (len(tokens), 2), bool)
    if not sides.any():
        return figure
    entropy = np.concatenate(entropies)
    entropies.clear()
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
            color=kinds("bound:N", ["low", "high"], "square"),
            tooltip=["tenth:O", "range:N", "bound:N", "share:Q"],
        ),
    )


def _sides(tokens: Tokens, entropies: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Whether each token in the loss met the lower, and the upper bound; its entropy is put into `entropies`."""
    for batch in tokens.batches("kept", "ratio", "clipped", "entropy"):
        some = batch[_kept(batch)]
        entropies.append(some["entropy"].to_numpy(np.float32))
        yield np.stack([some["clipped"] & (some["ratio"] < 1), some["clipped"] & (some["ratio"] > 1)], 1)


def lengths(tokens: Tokens) -> Figure:
    """Lengths of right and of wrong responses."""
    figure = Figure(
        "lengths",
        "Length of right and wrong responses",
        "Each outline is a distribution of its own: where wrong answers are the longer ones, a token mean lets "
        "them weigh more than a mean of responses would.",
        missing=NO_RECORDS,
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
        color=kinds("kind:N", ["right", "wrong"]),
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
        missing=NO_RECORDS,
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
        color=kinds("step:N", names),
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
        missing=NO_RECORDS
        if not len(tokens)
        else "The method gives tokens no number (HAPO, Archer and others do).",
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
            color=kinds("step:N", names),
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
        missing=NO_RECORDS
        if not len(tokens)
        else "It appears with a method that adapts the temperature (HAPO with component A), from its second "
        "recorded rollout batch.",
    )
    if "temperature" not in tokens:
        return figure
    drawn_at = {first: tokens.batch(first, "temperature")["temperature"] for first in tokens.rollouts}
    adapted = [first for first, some in drawn_at.items() if some.min() < some.max()]
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
            x=entropy_channel(alt.X, "entropy:Q", "entropy, nats, log scale"),
            y=alt.Y("temperature:Q", scale=alt.Scale(zero=False)),
            color=kinds("step:N", names, "circle"),
            tooltip=["step:N", "entropy:Q", "temperature:Q"],
        ),
    )


def _kept(batch: pd.DataFrame) -> pd.Series:
    """Whether the method keeps each token in the loss."""
    return batch["kept"] & batch["ratio"].notna()
