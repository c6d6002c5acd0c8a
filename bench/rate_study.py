"""DAPO at every rate that the map chose for another method (docs/evidence/map.md, "Method or rate?").

    python -m bench.rate_study [--regimes near far ...]

So that each method can be compared with DAPO at the method's own rate. The seeds are the map's. Adds the runs to
bench/results/rate_study.csv, a rate of a regime at a time; what is in there is not run again, and what failed is.
A regime that is not tuned is left, and so are runs that do not start where the map's do: a model that is trained
first is another one on another kind of processor.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from .method_map import REGIMES, RESULTS, add, at_rate, compare, machine, rates_of, read, recipe_of

OUTPUT = RESULTS.with_name("rate_study.csv")


def starts_alike(made: pd.DataFrame, of_the_map: pd.DataFrame) -> bool:
    """Whether the accuracy before training is that of the map for each seed, to the last bit."""
    starts = of_the_map.groupby("seed").start.first()
    return bool((made.start == made.seed.map(starts)).all())


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=REGIMES)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--work", type=Path, default=Path("runs/rate_study"))
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    for regime in given.regimes:
        rates = rates_of(regime)
        dapo = next((method for method in rates if method.partition(":")[0] == "dapo"), None)
        if dapo is None:
            print(f"{regime}: not tuned yet, left", flush=True)
            continue
        recipe_of(regime)
        for rate in sorted(set(rates.values()) - {rates[dapo]}):
            there = read(OUTPUT, regime)
            there = set(there[there.learning_rate == rate].seed)
            if there >= set(range(1, given.seeds + 1)):
                continue
            made = compare(
                regime, given.work / regime / f"{rate:g}", "--arms", at_rate(dapo, rate), "--seeds", given.seeds,
                "--jobs", 1,
            )  # fmt: skip
            if not starts_alike(made, read(RESULTS, regime)):
                print(f"{regime}, {dapo} at {rate:g}: the start is not the map's, left out", flush=True)
                continue
            made = made[~made.seed.isin(there)].drop(columns=["arm", "gradient_cosine"], errors="ignore")
            add(OUTPUT, made.assign(regime=regime, method=dapo, learning_rate=rate, machine=machine()))
            print(f"{regime}, {dapo} at {rate:g}: {len(made)} runs", flush=True)


if __name__ == "__main__":
    main()
