"""A comparison as files: results.csv, curves.csv, comparison.md, figures/*.svg and compare.html."""

from __future__ import annotations

from pathlib import Path

import altair as alt
import pandas as pd

from ..outputs import write_made
from .compare import Comparison, Measure
from .figures import Figure, printable, short, unchecked
from .finding import counted
from .page import new_nonce, render
from .statistics import MIN_SEEDS, Interval, mean_interval


@unchecked()
def write_comparison(
    comparison: Comparison,
    folder: Path,
    tuning: pd.DataFrame | None = None,
    *,
    of: str | None = None,
    replace: bool = False,
) -> Path:
    """Write results.csv, curves.csv, comparison.md, figures and compare.html; returns the page's path.

    Older ones of the same runs, as they were written, give way.

    Args:
        comparison: finished runs.
        folder: of the comparison.
        tuning: arm, learning_rate, seed and sampled accuracy of the runs that chose the learning rates.
        of: what names the runs; by default a hash of which they are.
        replace: write over whatever file is there.

    Raises:
        FileExistsError: another file is there, one of other runs, or one that was changed; nothing is written.
        OSError: a file cannot be written.
    """
    verdicts = [(m, table) for m in comparison.measures if (table := comparison.table(m)) is not None]
    drawn = figures(comparison, tuning)
    seeds = comparison.runs["seed"].nunique()
    html = render(
        "compare.html",
        title=printable(" · ".join(comparison.arms)),
        nonce=new_nonce(),
        figures=drawn,
        drawn=drawn,
        comparison=comparison,
        summary=summary(comparison),
        verdicts=[(m.title, table["verdict"].to_dict()) for m, table in verdicts],
        counts=f"{counted(len(comparison.arms), 'arm')}, {counted(seeds, 'paired seed')}",
    )
    files: dict[str, str | bytes] = {
        "results.csv": comparison.runs.to_csv(index=False),
        "curves.csv": comparison.curves.to_csv(index=False),
        "comparison.md": _markdown(comparison, verdicts),
        **{f"figures/{figure.name}.svg": figure.drawn("svg") for figure in drawn if figure.chart is not None},
        **({} if tuning is None else {"tuning.csv": tuning.to_csv(index=False)}),
        "compare.html": html,
    }
    write_made(folder, files, comparison.of if of is None else of, replace)
    return folder / "compare.html"


def summary(comparison: Comparison) -> pd.DataFrame:
    """One row an arm, as text: means over seeds with 95 % intervals, how often it reached the target, and fell."""
    rows = {}
    for arm, runs in comparison.runs.groupby("arm", sort=False):
        row = {"seeds": str(len(runs))}
        for measure in comparison.measures:
            row[measure.title] = _mean(runs[measure.column], measure)
        row["tokens"] = f"{runs['num_tokens'].mean() / 1e3:,.1f} thousand"
        if comparison.target is not None:
            row["reached the target"] = f"{int(runs['reached'].sum())} of {len(runs)}"
        row["collapsed"] = f"{int(runs['collapsed'].sum())} of {len(runs)}"
        if "clip_low" in runs and runs["clip_low"].notna().any():
            low, high = 100 * runs["clip_low"].mean(), 100 * runs["clip_high"].mean()
            row["clipped tokens, low / high"] = f"{low:.2f} / {high:.2f} %"
        rows[str(arm)] = row
    return pd.DataFrame.from_dict(rows, orient="index").fillna("")


def figures(comparison: Comparison, tuning: pd.DataFrame | None) -> list[Figure]:
    """Accuracy over tokens, differences with intervals, every seed, and the tuning."""
    return [_curves(comparison), _differences(comparison), _seeds(comparison), *_tuning(tuning, comparison.arms)]


def _curves(comparison: Comparison) -> Figure:
    rows = []
    measured = comparison.curves[comparison.curves.how == comparison.how]
    seeds = comparison.runs.groupby("arm")["seed"].nunique()
    for (arm, _), some in measured.groupby(["arm", measured.groupby(["arm", "seed"]).cumcount()], sort=False):
        if len(some) < seeds[arm]:  # some runs had spent their tokens before
            continue
        found = _interval(some["mean"])
        rows.append(
            {
                "arm": arm,
                "tokens": short(some["num_tokens"].mean()),
                "accuracy": short(found.mean),
                "low": short(found.low),
                "high": short(found.high),
            }
        )
    data = alt.Chart(alt.Data(values=rows))
    x = alt.X("tokens:Q", title="tokens generated")
    colour = alt.Color("arm:N", title=None, sort=comparison.arms)
    band = data.mark_area(opacity=0.15).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=colour)
    line = data.mark_line(point=True, strokeWidth=2).encode(
        x=x,
        y=alt.Y("accuracy:Q", title=f"held-out accuracy, {comparison.how}", axis=alt.Axis(format="%")).scale(
            zero=False
        ),
        color=colour,
        tooltip=["arm:N", "tokens:Q", alt.Tooltip("accuracy:Q", format=".1%")],
    )
    return Figure(
        "accuracy",
        "Held-out accuracy over tokens",
        "Means over seeds, with 95 % intervals from five seeds on; bands that overlap do not mean equal arms: "
        "pairs are compared below.",
        band + line,
    )


def _differences(comparison: Comparison) -> Figure:
    title, look = (
        f"Difference to {comparison.reference}, accuracy at the end",
        "Intervals that hold 0 show nothing.",
    )
    rows = []
    for measure in comparison.accuracies:
        table = comparison.table(measure)
        if table is None or table["low"].isna().all():
            missing = f"an interval needs two arms with {MIN_SEEDS} seeds each"
            return Figure("differences", title, look, missing=missing)
        for row in table.dropna(subset="low").itertuples():
            values = {k: short(100 * getattr(row, k)) for k in ("difference", "low", "high")}
            rows.append({"arm": row.Index, "how": measure.column, "p": short(row.p_holm), **values})
    data = alt.Chart(alt.Data(values=rows))
    y = alt.Y("arm:N", title=None, sort=comparison.arms)
    shift = alt.YOffset("how:N")
    colour = alt.Color("how:N", title=None)
    zero = alt.Chart(alt.Data(values=[{"x": 0}])).mark_rule(strokeDash=[3, 3]).encode(x="x:Q")
    bar = data.mark_rule(strokeWidth=2).encode(
        x=alt.X("low:Q", title="points, 95 % interval"), x2="high:Q", y=y, yOffset=shift, color=colour
    )
    tips = ["arm:N", "how:N", "difference:Q", "low:Q", "high:Q", alt.Tooltip("p:Q", title="p after Holm")]
    dot = data.mark_point(filled=True, size=70, opacity=1).encode(
        x="difference:Q", y=y, yOffset=shift, color=colour, tooltip=tips
    )
    return Figure("differences", title, look, zero + bar + dot)


def _seeds(comparison: Comparison) -> Figure:
    runs = comparison.runs
    rows = [
        {"arm": arm, "seed": seed, "accuracy": short(value)}
        for _, arm, seed, value in runs[["arm", "seed", comparison.how]].itertuples()
    ]
    data = alt.Chart(alt.Data(values=rows))
    x = alt.X("arm:N", title=None, sort=comparison.arms, axis=alt.Axis(labelAngle=-30))
    y = alt.Y("accuracy:Q", title=f"held-out accuracy, {comparison.how}", axis=alt.Axis(format="%")).scale(
        zero=False
    )
    line = data.mark_line(opacity=0.25, strokeWidth=1).encode(x=x, y=y, detail="seed:N")
    dot = data.mark_point(filled=True, opacity=0.8).encode(
        x=x,
        y=y,
        color=alt.Color("arm:N", legend=None, sort=comparison.arms),
        tooltip=["arm:N", "seed:N", "accuracy:Q"],
    )
    return Figure(
        "seeds", "Every seed", "A line joins the runs of one seed: parallel lines mean paired noise.", line + dot
    )


def _tuning(tuning: pd.DataFrame | None, arms: list[str]) -> list[Figure]:
    if tuning is None:
        return []
    rows = [
        {"arm": arm, "rate": rate, "accuracy": short(some["sampled"].mean())}
        for (arm, rate), some in tuning.groupby(["arm", "learning_rate"], sort=False)
    ]
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=True, strokeWidth=2)
        .encode(
            x=alt.X("rate:Q", title="learning rate", scale=alt.Scale(type="log"), axis=alt.Axis(format=".0e")),
            y=alt.Y("accuracy:Q", title="accuracy on the tuning problems", axis=alt.Axis(format="%")).scale(
                zero=False
            ),
            color=alt.Color("arm:N", title=None, sort=arms),
            tooltip=["arm:N", "rate:Q", "accuracy:Q"],
        )
    )
    look = "Each arm runs at its own best rate; a best at the edge says that the grid is too narrow."
    return [Figure("tuning", "Accuracy by learning rate", look, chart)]


def _interval(values: pd.Series) -> Interval:
    if len(values) >= MIN_SEEDS:
        return mean_interval(values)
    mean = float(values.mean())
    return Interval(mean, mean, mean, len(values))


def _mean(values: pd.Series, measure: Measure) -> str:
    values = values.dropna() * measure.scale
    if values.empty:
        return ""
    unit = "%" if measure.unit == "points" else measure.unit
    digits = (
        1
        if measure.scale >= 1 and measure.unit in ("points", "s", "tokens")
        else 3
        if measure.unit == "nats"
        else 1
    )
    if len(values) < MIN_SEEDS:
        return f"{values.mean():.{digits}f} {unit}"
    found = mean_interval(values)
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}] {unit}"


def _markdown(comparison: Comparison, verdicts: list[tuple[Measure, pd.DataFrame]]) -> str:
    table = summary(comparison).T
    target = "none" if comparison.target is None else f"{100 * comparison.target:.1f} % held-out, {comparison.how}"
    lines = [
        f"Reference: {comparison.reference}. Target: {target}.",
        "",
        "| | " + " | ".join(map(str, table.columns)) + " |",
        "|---|" + "---|" * len(table.columns),
        *(
            "| " + " | ".join([str(name), *map(str, row)]) + " |"
            for name, row in zip(table.index, table.values, strict=True)
        ),
    ]
    for measure, found in verdicts:
        lines += ["", f"**{measure.title}**", "", *(f"- {arm}: {v}" for arm, v in found["verdict"].items())]
    if comparison.warnings:
        lines += ["", "**What this comparison cannot show**", "", *(f"- {w}" for w in comparison.warnings)]
    return "\n".join(lines) + "\n"
