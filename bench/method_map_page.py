"""What the runs of the map show: its tables, as docs/evidence/map.md has them, and its picture.

    python -m bench.method_map_page    # prints the tables, writes docs/evidence/map.svg

A test holds the page to the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import altair as alt
import pandas as pd

from hapo.insight.figures import Figure
from hapo.insight.statistics import MIN_SEEDS, holm, mean_interval, paired_difference

from .method_map import REGIMES, RESULTS, TUNING

REFERENCE = "dapo"
SEEDS = 12
"""Of each method in each regime, as the plan has it."""
STEPS = RESULTS.with_name("steps.csv")
UPDATES = RESULTS.with_name("map_updates.csv")
VARIANT = RESULTS.with_name("variant_study.csv")
RATES = RESULTS.with_name("rate_study.csv")
REAL = RESULTS.with_name("map_smollm2.csv")
ARMS = {
    "dapo": "dapo",
    "dapo:filter_groups=false": "dapo, no filter",
    "dapo:learning_rate=8.7e-5": "dapo, rate 8.7e-5",
    "hapo": "hapo",
    "hapo:filter_groups=false": "hapo, no filter",
    "grpo:beta=0.0": "grpo",
}
"""Of the test of the filter, as the page calls them."""
PICTURE = Path(__file__).parents[1] / "docs" / "evidence" / "map.svg"


def runs() -> pd.DataFrame:
    """The rows of the whole regimes, a method by its name alone: the options of a regime are in its recipe.

    A regime of which seeds are still to come is not looked at.
    """
    rows = pd.read_csv(RESULTS)
    rows = _named(rows)
    seeds = rows.groupby(["regime", "name"]).seed.nunique().groupby("regime").min()
    return rows[rows.regime.map(seeds) >= SEEDS]


def _named(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(name=[method.partition(":")[0] for method in rows.method])


def filter_runs() -> pd.DataFrame:
    """The rows of the test of the filter, in the same form."""
    rows = pd.read_csv(STEPS)
    return rows.assign(name=rows.arm.map(ARMS), regime="filter")


def differences(rows: pd.DataFrame, measures: Sequence[str] = ("sampled", "greedy")) -> pd.DataFrame:
    """Each method against DAPO, where MIN_SEEDS pairs have run: points with interval, Holm over all of `rows`.

    One row for each regime, method and measure; the family of `p_holm` is one measure's comparisons.
    """
    found = []
    for regime, of_regime in rows.groupby("regime"):
        for measure in measures:
            wide = of_regime.pivot(index="seed", columns="name", values=measure)
            for name in wide.columns.drop(REFERENCE):
                pairs = wide[[name, REFERENCE]].dropna()
                if len(pairs) >= MIN_SEEDS:
                    d = paired_difference(pairs[name], pairs[REFERENCE])
                    row = {"regime": regime, "name": name, "measure": measure, "pairs": len(pairs), "p": d.p}
                    found.append(row | {"points": 100 * d.mean, "low": 100 * d.low, "high": 100 * d.high})
    table = pd.DataFrame(found)
    table["p_holm"] = table.groupby("measure").p.transform(holm)
    return table


def tables() -> dict[str, list[str]]:
    """Regime -> the lines of its table, in Markdown; "filter" is the test of the filter."""
    made = {}
    for rows in (runs(), filter_runs()):
        against = differences(rows).set_index(["regime", "name", "measure"])
        for regime in against.index.unique("regime"):
            made[regime] = _table(rows[rows.regime == regime], against.loc[regime])
    return {regime: made[regime] for regime in (*REGIMES, "filter") if regime in made}


def variant() -> list[str]:
    """The lines of the table of HAPO's C and its variant, near the rollout policy (bench/variant_study.py)."""
    rows = pd.read_csv(VARIANT)
    rows = rows[rows.regime == "near"]
    rows = _named(rows)
    against = differences(rows).set_index(["regime", "name", "measure"])
    return _table(rows, against.loc["near"])


def pooled() -> list[str]:
    """The lines of the table over all whole regimes: a seed's mean difference to DAPO, Holm over the methods."""
    return _over_regimes(runs(), _dapo(runs()), "", ("sampled",))


def equal_rates() -> list[str]:
    """The same beside DAPO at the rate of each method, and where that is not DAPO's.

    Over the regimes for which bench/rate_study.py has rows.
    """
    others = pd.read_csv(RATES).assign(name=REFERENCE)
    rows = runs()
    rows = rows[rows.regime.isin(others.regime)]
    others = others[others.regime.isin(rows.regime)]
    return _over_regimes(rows, pd.concat([_dapo(rows), others]), " at its rate", ("sampled", "greedy"))


def _dapo(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows.name == REFERENCE]


def _over_regimes(rows: pd.DataFrame, dapo: pd.DataFrame, which: str, measures: Sequence[str]) -> list[str]:
    """Each method beside the rows of DAPO of its regime, seed and, if `which` says so, rate."""
    keys = ["regime", "seed", *(["learning_rate"] if which else [])]
    pairs = rows[rows.name != REFERENCE].merge(dapo[[*keys, *measures]], on=keys, suffixes=("", "_dapo"))
    tuned = _dapo(rows).groupby("regime").learning_rate.first()
    names, cells = list(pairs.name.unique()), []
    for measure in measures:
        by_seed = (pairs[measure] - pairs[f"{measure}_dapo"]).groupby([pairs.name, pairs.seed]).mean()
        found = [paired_difference(by_seed[name], 0 * by_seed[name]) for name in names]
        p = holm([d.p for d in found])
        cells.append(
            [_in_words(100 * d.mean, 100 * d.low, 100 * d.high, q) for d, q in zip(found, p, strict=True)]
        )
    titles = [f"{measure} − DAPO{which}, mean of the regimes [95 %], p after Holm" for measure in measures]
    if which:
        titles.append("other rates in")
        mine = pairs.groupby(["name", "regime"]).learning_rate.first()
        cells.append(
            [", ".join(r for r, rate in mine[name].items() if rate != tuned[r]) or "none" for name in names]
        )
    lines = [f"| | {' | '.join(titles)} |", "|" + "---|" * (1 + len(titles))]
    return lines + [f"| {' | '.join(line)} |" for line in zip(names, *cells, strict=True)]


def real() -> list[str]:
    """The lines of the table of SmolLM2 (bench/compare/smollm2.yaml): the seeds that every arm has."""
    rows = pd.read_csv(REAL)
    rows = _named(rows.assign(method=rows.arm, regime="smollm2"))
    rows = rows[rows.groupby("seed").name.transform("nunique") == rows.name.nunique()]
    return _table(rows, differences(rows).set_index(["regime", "name", "measure"]).loc["smollm2"])


def mechanisms() -> list[str]:
    """The lines of the table of what methods do to a step: means over the seeds of each regime that is whole.

    The cosine is that of the gradient of a run's first step with DAPO's of the same seed: one rollout batch, equal
    parameters. Clipped tokens are means over the run.
    """
    rows = runs()
    rows = rows.assign(clipped=100 * (rows.clip_low + rows.clip_high))
    return _by_regime(rows, {"cosine": ("gradient_cosine", 2), "clipped, %": ("clipped", 2)})


def updates() -> list[str]:
    """The lines of the table of what a step moves (bench/map_updates.py): means over steps and seeds.

    Per token is the sum of the norms over the sum of the tokens that count: a step may have none, where Adam still
    moves.
    """
    rows = pd.read_csv(UPDATES)
    rows = _named(rows)
    sums = rows.groupby(["name", "regime"])[["update_norm", "kept_tokens"]].transform("sum")
    rows = rows.assign(norm=1e3 * rows.update_norm, per_token=1e6 * sums.update_norm / sums.kept_tokens)
    columns = {"rate": ("learning_rate", None), "norm, 1e-3": ("norm", 1), "per token, 1e-6": ("per_token", 1)}
    return _by_regime(rows, columns)


def _by_regime(rows: pd.DataFrame, columns: dict[str, tuple[str, int | None]]) -> list[str]:
    """A table with a line a method and, for each title, a column a regime: means, with so many decimals."""
    regimes = [regime for regime in REGIMES if regime in set(rows.regime)]
    means = rows.groupby(["name", "regime"])[[column for column, _ in columns.values()]].mean()
    titles = [f"{regime}: {title}" for title in columns for regime in regimes]
    lines = [f"| | {' | '.join(titles)} |", "|" + "---|" * (1 + len(titles))]
    for name in rows.name.unique():
        values = [(means.loc[(name, regime), c], n) for c, n in columns.values() for regime in regimes]
        cells = [f"{value:.0e}" if n is None else f"{value:.{n}f}" for value, n in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _table(rows: pd.DataFrame, against: pd.DataFrame) -> list[str]:
    tuned = ["rate"] if "learning_rate" in rows else []
    start = f"{rows.seed.nunique()} seeds, start {100 * rows.start.mean():.1f} %"
    names = ["sampled, %", "sampled − DAPO [95 %], p after Holm", "greedy, %", "greedy − DAPO", "length"]
    lines = [f"| {' | '.join([start, *tuned, *names, 'gradient norm', 'collapsed'])} |"]
    lines.append("|" + "---|" * (len(tuned) + 8))
    for name in rows.name.unique():
        mine = rows[rows.name == name]
        sampled = mean_interval(100 * mine.sampled)
        cells = [name, *([_rate(mine.regime.iloc[0], mine.learning_rate.iloc[0])] if tuned else [])]
        cells += [f"{sampled.mean:.1f} [{sampled.low:.1f}, {sampled.high:.1f}]", _told(against, name, "sampled")]
        cells += [f"{100 * mine.greedy.mean():.1f}", _told(against, name, "greedy"), f"{mine.length.mean():.1f}"]
        lines.append(f"| {' | '.join([*cells, f'{mine.grad_norm.mean():.2f}', str(mine.collapsed.sum())])} |")
    return lines


def _rate(regime: str, rate: float) -> str:
    """With an arrow where it is the least or the greatest of the grid: the best may lie beyond."""
    grid = pd.read_csv(TUNING).query("regime == @regime").learning_rate
    return f"{rate:.0e}{' ↓' if rate == grid.min() else ' ↑' if rate == grid.max() else ''}"


def _told(against: pd.DataFrame, name: str, measure: str) -> str:
    if (name, measure) not in against.index:
        return ""
    row = against.loc[(name, measure)]
    return _in_words(row.points, row.low, row.high, row.p_holm)


def _in_words(points: float, low: float, high: float, p: float) -> str:
    words = f"{points:.1f} [{low:.1f}, {high:.1f}], {p:.2g}".replace("-", "−")
    return f"**{words}**" if p <= 0.05 else words


def picture() -> Figure:
    """Methods x regimes: the difference to DAPO in sampled accuracy, with its interval."""
    rows = runs()
    table = differences(rows, ("sampled",))
    table = table.assign(shown=["yes" if p <= 0.05 else "no" for p in table.p_holm])
    y = alt.Y("name:N", title=None, sort=list(rows.name.unique()))
    colour = alt.Color("shown:N", title="difference shown, after Holm").scale(domain=["no", "yes"])
    data = alt.Data(values=table.round(4).to_dict("records"))
    zero = alt.Chart().mark_rule(strokeDash=[3, 3]).encode(x=alt.datum(0))
    bar = (
        alt.Chart()
        .mark_rule(strokeWidth=2)
        .encode(x=alt.X("low:Q", title="points"), x2="high:Q", y=y, color=colour)
    )
    dot = alt.Chart().mark_point(filled=True, size=60, opacity=1).encode(x="points:Q", y=y, color=colour)
    order = [regime for regime in REGIMES if regime in set(table.regime)]
    column = alt.Column("regime:N", sort=order, title=None)
    chart = alt.layer(zero, bar, dot, data=data).properties(width=150, height=260).facet(column=column)
    chart = chart.properties(padding={"left": 20, "right": 5, "top": 5, "bottom": 5})  # the longest name is wider
    return Figure("map", "The map", "Intervals that hold 0 show nothing.", chart)


def main() -> None:
    """Print the tables and draw the picture."""
    for regime, lines in tables().items():
        print(f"\n{regime}\n\n" + "\n".join(lines))
    print("\nvariant\n\n" + "\n".join(variant()))
    print("\npooled\n\n" + "\n".join(pooled()))
    print("\nequal rates\n\n" + "\n".join(equal_rates()))
    print("\nreal\n\n" + "\n".join(real()))
    print("\nmechanisms\n\n" + "\n".join(mechanisms()))
    print("\nupdates\n\n" + "\n".join(updates()))
    PICTURE.write_bytes(picture().drawn("svg"))


if __name__ == "__main__":
    main()
