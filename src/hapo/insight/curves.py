"""Figures over optimiser steps, several runs overlaid."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import altair as alt
import pandas as pd

from .figures import Figure, labels, short
from .run import Run

POINTS = 240
"""Most points of a line; of a longer run each is the mean of neighbours."""
SPAN = 20
"""Smoothed lines are exponentially weighted means with a span of 1/20 of the logged steps."""

POWERS = [10.0**k for k in range(-4, 4)]
"""Ticks of a log scale; what lies below is drawn at its lower end."""


@dataclass(frozen=True)
class Curve:
    """What a figure over optimiser steps shows: the first of `choices` of which a run logged something."""

    name: str
    title: str
    look: str
    axis: str
    choices: tuple[dict[str, str], ...]
    """Each a set of lines, {name of the line: metric}."""
    missing: str
    unit: Literal["number", "share", "log"] = "number"
    band: tuple[str, str] | None = None
    """Metrics between which a band is drawn."""


_REPEATED = "It appears with `steps_per_generation` or `num_iterations` above 1, with any method of hapo."
_OURS = "Runs of TRL's own trainers do not log it; those of hapo do."

CURVES = (
    Curve(
        "reward",
        "Reward",
        "It should rise; when it rises and held-out accuracy does not, look at what is rewarded.",
        "mean reward",
        ({"reward": "reward"}, {"reward": "critic/score/mean"}),
        "No step with a reward was logged yet.",
    ),
    Curve(
        "entropy",
        "Entropy of the policy",
        "A fall towards zero is a collapse: answers stop to differ, and nothing is left to learn from.",
        "mean entropy, nats",
        ({"entropy": "entropy"}, {"entropy": "actor/entropy"}),
        "No step with an entropy was logged yet.",
    ),
    Curve(
        "length",
        "Length of responses",
        "When wrong answers outgrow right ones, the loss may be paying for length rather than for reasoning.",
        "mean tokens",
        (
            {"right": "completions/mean_length_right", "wrong": "completions/mean_length_wrong"},
            {"all": "completions/mean_length"},
            {"all": "response_length/mean"},
        ),
        "No response was logged yet.",
    ),
    Curve(
        "truncated",
        "Truncated responses",
        "Share that ended at the length limit: near 1 the task does not fit, and no reward can be earned.",
        "share of responses",
        ({"truncated": "completions/clipped_ratio"}, {"truncated": "response_length/clip_ratio"}),
        "No response was logged yet.",
        "share",
    ),
    Curve(
        "clipped",
        "Clipped tokens",
        "Shares of tokens whose ratio met a bound: zero in the first update of a rollout batch by construction.",
        "share of tokens",
        (
            {"low": "clip_ratio/low_mean", "high": "clip_ratio/high_mean"},
            {"low": "actor/pg_clipfrac_lower", "all": "actor/pg_clipfrac"},
        ),
        "The run logged no clip share.",
        "share",
    ),
    Curve(
        "temperature",
        "Sampling temperature",
        "Mean over tokens, in a band from the least to the greatest: how far the method moves it from its base.",
        "temperature",
        ({"mean": "temperature/mean"},),
        "It appears with a method that adapts the temperature (HAPO with component A), from its second rollout.",
        band=("temperature/min", "temperature/max"),
    ),
    Curve(
        "sampler-weight",
        "Importance weight of the sampler",
        "min(exp(logp_old − logp_sampler), cap), mean: far from 1, training sees another distribution than drew.",
        "mean weight",
        (
            {"weight": "sampler_weight/mean"},
            {"weight": "sampling/importance_sampling_ratio/mean"},
        ),
        f"It appears where the sampler's log-probabilities are known. {_OURS}",
    ),
    Curve(
        "mismatch",
        "Mismatch of sampler and policy",
        "|logp_old − logp_sampler|: a mean that grows says that sampler and trainer drift apart.",
        "nats, log scale",
        (
            {
                "mean": "sampling/sampling_logp_difference/mean",
                "greatest": "sampling/sampling_logp_difference/max",
            },
        ),
        f"It appears where the sampler's log-probabilities are known. {_OURS}",
        "log",
    ),
    Curve(
        "groups",
        "Groups that teach nothing",
        "Share of prompts whose responses all earned the same: as it nears 1, steps become empty.",
        "share of groups",
        ({"equal rewards": "frac_reward_zero_std", "used": "groups/used"},),
        "The run logged no share of groups.",
        "share",
    ),
    Curve(
        "kl",
        "Distance to the old and the reference policy",
        "How far updates move within a rollout batch (old), and how far the run has gone (reference).",
        "KL, nats a token",
        (
            {"old policy": "kl_old", "reference": "kl"},
            {"old policy": "actor/ppo_kl", "reference": "actor/kl_loss"},
        ),
        f"It appears with any method of hapo, or with a KL penalty. {_OURS}",
    ),
    Curve(
        "ratio",
        "Importance ratio",
        "Mean of π / π_old over tokens: exactly 1 on-policy, and close to 1 while updates stay small.",
        "mean ratio",
        ({"ratio": "ratio/mean"},),
        _REPEATED,
    ),
    Curve(
        "grad-norm",
        "Gradient norm",
        "Before clipping: single spikes are usual, a rising floor is not.",
        "norm",
        ({"norm": "grad_norm"}, {"norm": "actor/grad_norm"}),
        "No step with a gradient was logged yet.",
    ),
)


SUPERVISED = (
    Curve(
        "loss",
        "Loss",
        "The weighted negative log-likelihood of the targets: it should fall. Methods weigh differently, so their "
        "losses do not compare.",
        "nats per target",
        ({"loss": "loss"},),
        "No step was logged yet.",
    ),
    Curve(
        "weight",
        "Weight of the targets",
        "Mean over the targets; SFT is 1 everywhere and logs none.",
        "mean weight",
        ({"weight": "weight"},),
        "It appears with methods that weigh the targets.",
    ),
    Curve(
        "entropy",
        "Entropy of the policy",
        "At the targets. A fall is what fitting looks like; near 0 the policy has lost its alternatives.",
        "mean entropy, nats",
        ({"entropy": "entropy"},),
        "No step with an entropy was logged yet.",
    ),
    Curve(
        "token-accuracy",
        "Targets ranked first",
        "Share of the targets that are the model's first choice.",
        "share of targets",
        ({"first": "mean_token_accuracy"},),
        "No step was logged yet.",
        "share",
    ),
)
"""Of runs that learnt from demonstrations; their gradient norm is that of `CURVES`."""


def curves(runs: Sequence[Run]) -> list[Figure]:
    """The figures over optimiser steps, runs overlaid: reward, held-out accuracy, entropy, and the rest."""
    if runs and all(run.supervised for run in runs):
        of_loss, *of_rest = [_curve(runs, curve) for curve in (*SUPERVISED, *CURVES[-1:])]
        measured = [accuracy(runs)] if any(len(run.evaluations) for run in runs) else []
        return [of_loss, held_out_loss(runs), *measured, *of_rest]
    first, *rest = [_curve(runs, curve) for curve in CURVES]
    return [first, accuracy(runs), *rest, times(runs)]


def others(runs: Sequence[Run]) -> list[Figure]:
    """A small figure for every number that was logged and that `curves` leaves out, by name."""
    shown = SUPERVISED if runs and all(run.supervised for run in runs) else CURVES
    known = {m for curve in shown for choice in curve.choices for m in choice.values()}
    known |= {m for curve in shown for m in curve.band or ()} | {"step", "wall_seconds", "epoch", "num_tokens"}
    logged = {m for run in runs for m in run.metrics.select_dtypes("number")} - known
    found = []
    for n, metric in enumerate(sorted(m for m in logged if not m.startswith("time/"))):
        curve = Curve(f"other-{n}", metric, "As it was logged.", "", ({metric: metric},), "It was never a number.")
        found.append(_curve(runs, curve, points=POINTS // 4))
    return [figure for figure in found if figure.chart is not None]


def held_out_loss(runs: Sequence[Run]) -> Figure:
    """Loss on held-out demonstrations over steps."""
    figure = Figure(
        "held-out-loss",
        "Held-out loss",
        "On demonstrations that were not trained on: where it turns and rises, training learns by heart.",
        missing="It appears when held-out demonstrations are measured (`evaluate`, on by default in `hapo sft`).",
    )
    rows = [
        {"run": name, "line": "held out", "step": int(line.step), "loss": short(line.eval_loss)}
        for run, name in zip(runs, labels(runs), strict=True)
        for line in run.held_out_loss().itertuples()
    ]
    if not rows:
        return figure
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=_steps(), **_colours(runs, ["held out"]))
    y = alt.Y("loss:Q", title="nats per target", scale=alt.Scale(zero=False))
    drawn = base.mark_line(strokeWidth=2, point=True).encode(y=y, tooltip=["run:N", "step:Q", "loss:Q"])
    return replace(figure, chart=drawn)


def accuracy(runs: Sequence[Run]) -> Figure:
    """Held-out accuracy over steps, with the intervals of each measurement."""
    figure = Figure(
        "accuracy",
        "Held-out accuracy",
        "Bars are 95 % intervals of one measurement: a change within them is no finding.",
        missing="It appears when the run measures held-out problems (`evaluate`, on by default in `hapo train`).",
    )
    rows, binary, numbers = [], True, ("step", "mean", "low", "high", "problems", "samples")
    for run, name in zip(runs, labels(runs), strict=True):
        for line in run.evaluations.itertuples():
            values = {k: short(getattr(line, k)) for k in numbers}
            rows.append({"run": name, "line": str(line.how), **values})
            binary = binary and bool(line.binary)
    if not rows:
        return figure
    title, axis = ("accuracy", alt.Axis(format=".0%")) if binary else ("mean score", alt.Axis())
    y = partial(alt.Y, title=title, scale=alt.Scale(zero=False), axis=axis)
    tip = [alt.Tooltip("run:N"), alt.Tooltip("line:N", title="answers"), *(f"{k}:Q" for k in numbers)]
    base = alt.Chart().encode(x=_steps(), **_colours(runs, ["greedy", "sampled"]))
    chart = alt.layer(
        base.mark_line(strokeWidth=2).encode(y=y("mean:Q")),
        base.mark_rule(strokeWidth=1.5, opacity=0.7).encode(y=y("low:Q"), y2="high:Q"),
        base.mark_point(filled=True, size=45, opacity=1).encode(y=y("mean:Q"), tooltip=tip),
        data=alt.InlineData(values=rows),
    )
    return replace(figure, chart=chart)


def times(runs: Sequence[Run]) -> Figure:
    """Seconds of a rollout batch by phase: over the steps of one run, as means of several."""
    figure = Figure(
        "time",
        "Time by phase",
        "Seconds of a rollout batch: where a faster sampler, reward or update would pay.",
        missing=f"Its parts are logged as time/generate, time/reward, time/score and time/update. {_OURS}",
    )
    phases = {"generate": "time/generate", "reward": "time/reward", "score": "time/score", "update": "time/update"}
    rows = [row for run, name in zip(runs, labels(runs), strict=True) for row in _rows(run, name, phases, POINTS)]
    if not rows:
        return figure
    square = alt.Legend(title=None, symbolType="square", symbolStrokeWidth=0)
    colour = alt.Color("line:N", legend=square, scale=alt.Scale(domain=list(phases)))
    seconds = "seconds a rollout batch"
    tip = [alt.Tooltip("run:N"), alt.Tooltip("line:N", title="phase"), alt.Tooltip("raw:Q", title="seconds")]
    if len(runs) == 1 and len({row["step"] for row in rows}) > 1:
        area = alt.Chart(alt.InlineData(values=rows)).mark_area(opacity=0.85)
        y = alt.Y("raw:Q", title=seconds)
        return replace(figure, chart=area.encode(x=_steps(), y=y, color=colour, tooltip=[*tip, "step:Q"]))
    means = pd.DataFrame(rows).groupby(["run", "line"], sort=False)["raw"].mean().map(short).reset_index()
    bars = alt.Chart(alt.InlineData(values=means.to_dict("records"))).mark_bar(height=24)
    x, y = alt.X("raw:Q", title=seconds), alt.Y("run:N", title=None, sort=None)
    return replace(figure, chart=bars.encode(x=x, y=y, color=colour, tooltip=tip))


def _curve(runs: Sequence[Run], curve: Curve, points: int = POINTS) -> Figure:
    figure = Figure(curve.name, curve.title, curve.look, missing=curve.missing)
    rows: list[dict[str, Any]] = []
    lines: list[str] = []
    for run, name in zip(runs, labels(runs), strict=True):
        for choice in curve.choices:
            if found := _rows(run, name, choice, points, curve.band, positive=curve.unit == "log"):
                rows += found
                lines += [line for line in dict.fromkeys(row["line"] for row in found) if line not in lines]
                break
    if not rows:
        return figure
    ticks = [tick for tick in POWERS if tick <= max(row["raw"] for row in rows)]
    scale, axis = {
        "number": (alt.Scale(zero=False), alt.Axis()),
        "share": (alt.Scale(zero=False), alt.Axis(format="~%")),
        "log": (alt.Scale(type="log", domainMin=1e-4, clamp=True), alt.Axis(format="~g", values=ticks)),
    }[curve.unit]
    y = partial(alt.Y, title=curve.axis, scale=scale, axis=axis)
    few = len({row["step"] for row in rows}) <= 12
    smooth, raw = alt.Tooltip("smooth:Q", title="smoothed"), alt.Tooltip("raw:Q", title="logged")
    hover = alt.selection_point(on="pointerover", clear="pointerout", empty=False)
    shown = alt.value(1) if few else alt.when(hover).then(alt.value(1)).otherwise(alt.value(0))
    base = alt.Chart().encode(x=_steps(), **_colours(runs, lines))
    dots = base.mark_point(filled=True).encode(y=y("smooth:Q"))
    layers = [
        base.mark_line(strokeWidth=1, opacity=0.3).encode(y=y("raw:Q")),
        base.mark_line(strokeWidth=2).encode(y=y("smooth:Q")),
        dots.encode(size=alt.value(36), opacity=shown),
        dots.encode(
            size=alt.value(240), opacity=alt.value(0), tooltip=["run:N", "line:N", "step:Q", smooth, raw]
        ).add_params(hover),  # a wide target: nearest=True would lose the texts of the tooltip
    ]
    if curve.band:
        layers.insert(0, base.mark_area(opacity=0.14).encode(y=y("low:Q"), y2="high:Q"))
    return replace(figure, chart=alt.layer(*layers, data=alt.InlineData(values=rows)))


def _colours(runs: Sequence[Run], lines: Sequence[str]) -> dict[str, Any]:
    """Colour tells lines apart in one run, and runs in several; there dashes tell the lines apart."""
    several = len(lines) > 1
    if len(runs) == 1:
        key = alt.Legend(title=None) if several else None
        return {"color": alt.Color("line:N", legend=key, scale=alt.Scale(domain=list(lines)))}
    names = alt.Color("run:N", legend=alt.Legend(title=None), scale=alt.Scale(domain=labels(runs)))
    if not several:
        return {"color": names}
    key = alt.Legend(title=None, symbolStrokeColor="gray", symbolFillColor="transparent")
    return {
        "color": names,
        "strokeDash": alt.StrokeDash("line:N", legend=key, scale=alt.Scale(domain=list(lines))),
    }


def _rows(
    run: Run,
    name: str,
    lines: dict[str, str],
    points: int,
    band: Iterable[str] | None = None,
    positive: bool = False,
) -> list[dict[str, Any]]:
    """Points of the lines of a run: blocks of logged steps with their mean and the smoothed value at their end."""
    rows = []
    for line, metric in lines.items():
        if metric not in run.metrics:
            continue
        frame = run.metrics[["step", metric, *(b for b in band or () if b in run.metrics)]]
        frame = frame.apply(pd.to_numeric, errors="coerce").replace([math.inf, -math.inf], math.nan)
        frame = frame.dropna(subset=["step", metric])
        frame = frame[frame[metric] > 0] if positive else frame
        frame = frame.rename(columns={metric: "raw", **dict(zip(band or (), ("low", "high"), strict=False))})
        frame["smooth"] = frame["raw"].ewm(span=max(1.0, len(frame) / SPAN)).mean()
        block = pd.Series(range(len(frame)), index=frame.index) // max(1, math.ceil(len(frame) / points))
        how = {"step": "last", "smooth": "last", "low": "min", "high": "max", "raw": "mean"}
        thin = frame.groupby(block).agg({k: how[k] for k in frame})
        for values in thin.to_dict("records"):
            rows.append({"run": name, "line": line, **{k: short(v) for k, v in values.items()}})
    return rows


def _steps() -> alt.X:
    return alt.X("step:Q", title="optimiser step", scale=alt.Scale(nice=False), axis=alt.Axis(tickMinStep=1))
