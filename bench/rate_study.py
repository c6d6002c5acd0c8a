"""The methods that the map tells from DAPO, at DAPO's rate (docs/evidence/map.md, "Method or rate?").

    python -m bench.rate_study [--regimes near far ...]

Each of them runs in every regime where tuning chose another rate for it than for DAPO, with the seeds of the
map and the rate of DAPO. Adds the runs to bench/results/rate_study.csv, a method of a regime at a time; what is
in there is not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .method_map import CELL, REGIMES, RESULTS, add, at_rate, compare, machine, rates_of, read

OUTPUT = RESULTS.with_name("rate_study.csv")
METHODS = ("hapo", "gspo", "forking_tokens", "entropy_adv", "gtpo", "egspo")
"""Those that differ from DAPO over five regimes, after Holm."""


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
        there = set(read(OUTPUT, regime).method)
        rate = next(value for method, value in rates.items() if method.partition(":")[0] == "dapo")
        for method, tuned in rates.items():
            if method.partition(":")[0] not in METHODS or tuned == rate or method in there:
                continue
            folder = given.work / regime / method.partition(":")[0]
            made = compare(regime, folder, "--arms", at_rate(method, rate), "--seeds", given.seeds, "--jobs", 1)
            made = made.drop(columns=["arm", "gradient_cosine"], errors="ignore")
            made = made.assign(regime=regime, method=method, learning_rate=rate, machine=machine())
            first = [*CELL, "learning_rate", "machine"]
            add(OUTPUT, made[[*first, *(name for name in made if name not in first)]])
            print(f"{regime}, {method} at {rate:g}: done", flush=True)


if __name__ == "__main__":
    main()
