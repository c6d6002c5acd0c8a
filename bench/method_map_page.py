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

from .method_map import REGIMES, RESULTS

REFERENCE = "dapo"
PICTURE = Path(__file__).parents[1] / "docs" / "evidence" / "map.svg"


def runs() -> pd.DataFrame:
    """The rows of the map, a method by its name alone: the options of a regime are in its recipe."""
    rows = pd.read_csv(RESULTS)
    return rows.assign(name=[method.partition(":")[0] for method in rows.method])


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
    """Regime -> the lines of its table, in Markdown."""
    rows = runs()
    against = differences(rows).set_index(["regime", "name", "measure"])
    made = {}
    for regime in (regime for regime in REGIMES if regime in against.index.get_level_values(0)):
        of_regime = rows[rows.regime == regime]
        seeds = of_regime.seed.nunique()
        start = 100 * of_regime.start.mean()
        lines = [
            f"| {seeds} seeds, start {start:.1f} % | rate | sampled, % | sampled − DAPO [95 %], p after Holm | "
            "greedy, % | greedy − DAPO | length | collapsed |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name in of_regime.name.unique():
            mine = of_regime[of_regime.name == name]
            sampled = mean_interval(100 * mine.sampled)
            cells = [name, f"{mine.learning_rate.iloc[0]:.0e}"]
            cells += [f"{sampled.mean:.1f} [{sampled.low:.1f}, {sampled.high:.1f}]"]
            cells += [_told(against, regime, name, "sampled"), f"{100 * mine.greedy.mean():.1f}"]
            cells += [_told(against, regime, name, "greedy"), f"{mine.length.mean():.1f}"]
            lines.append(f"| {' | '.join([*cells, str(int(mine.collapsed.sum()))])} |")
        made[regime] = lines
    return made


def _told(against: pd.DataFrame, regime: str, name: str, measure: str) -> str:
    if (regime, name, measure) not in against.index:
        return ""
    row = against.loc[(regime, name, measure)]
    words = f"{row.points:.1f} [{row.low:.1f}, {row.high:.1f}], {row.p_holm:.2g}".replace("-", "−")
    return f"**{words}**" if row.p_holm <= 0.05 else words


def picture() -> Figure:
    """Methods x regimes: the difference to DAPO in sampled accuracy, with its interval."""
    table = differences(runs())
    table = table[table.measure == "sampled"]
    table = table.assign(shown=["yes" if p <= 0.05 else "no" for p in table.p_holm])
    data = alt.Chart(alt.Data(values=table.round(4).to_dict("records")))
    y = alt.Y("name:N", title=None, sort=list(runs().name.unique()))
    colour = alt.Color("shown:N", title="difference shown, after Holm", sort=["no", "yes"])
    zero = alt.Chart(alt.Data(values=[{"x": 0}])).mark_rule(strokeDash=[3, 3]).encode(x="x:Q")
    bar = data.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title="points"), x2="high:Q", y=y, color=colour)
    dot = data.mark_point(filled=True, size=60, opacity=1).encode(x="points:Q", y=y, color=colour)
    order = [regime for regime in REGIMES if regime in set(table.regime)]
    chart = alt.layer(zero, bar, dot, data=alt.Data(values=[])).facet(column=alt.Column("regime:N", sort=order))
    return Figure("map", "The map", "Intervals that hold 0 show nothing.", chart)


def main() -> None:
    """Print the tables and draw the picture."""
    for regime, lines in tables().items():
        print(f"\n{regime}\n\n" + "\n".join(lines))
    PICTURE.write_bytes(picture().drawn("svg"))


if __name__ == "__main__":
    main()
