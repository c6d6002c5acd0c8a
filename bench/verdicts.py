"""What paired runs of several arms show, in words: means, and differences from a reference after Holm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from hapo.insight.statistics import holm, mean_interval, paired_difference, verdict


def print_verdicts(runs: pd.DataFrame, arms: Sequence[str], reference: str, measures: Mapping[str, str]) -> None:
    """Print, for each measure (column -> title), the arms and how each of the others differs from the reference.

    Args:
        runs: a row a run, with columns `arm`, `seed` and the measures, which are shares; pairs are of one seed.
        arms: in the order of printing.
        reference: one of them.
        measures: what is compared; the family of Holm's correction is the arms of one measure.
    """
    others = [arm for arm in arms if arm != reference]
    width = max(map(len, arms)) + 2
    for measure, title in measures.items():
        wide = runs.pivot(index="seed", columns="arm", values=measure)
        print(title)
        for arm in arms:
            mean = mean_interval(wide[arm])
            print(f"  {arm:{width}}{100 * mean.mean:5.1f} % [{100 * mean.low:.1f}, {100 * mean.high:.1f}]")
        differences = [paired_difference(wide[arm], wide[reference]) for arm in others]
        for arm, difference, p in zip(others, differences, holm([d.p for d in differences]), strict=True):
            print("  " + verdict(difference, p, arm, reference, comparisons=len(others)))
