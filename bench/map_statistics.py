"""How often the map names a false winner, and how often its intervals cover, where all methods are equal.

    python -m bench.map_statistics --output bench/results/map_statistics.json

Maps of 14 methods in 6 regimes with 12 paired seeds, of noise alone, judged by `method_map_page.differences`
as the map is: symmetric bootstrap-t, Holm over the 78 comparisons. A seed's difficulty is common to its
methods. About two CPU minutes for a hundred maps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from .compare_statistics import SHAPES
from .method_map_page import REFERENCE, differences
from .paired import machine

METHODS, REGIMES, SEEDS = 14, 6, 12


def noise_map(shape: str, rng: np.random.Generator) -> pd.DataFrame:
    """The rows of a map without any effect."""
    draw, truth = SHAPES[shape]
    values = draw(rng, (REGIMES, METHODS, SEEDS)) - truth  # type: ignore[arg-type]
    values += values.std() * rng.normal(size=(REGIMES, 1, SEEDS))
    names = [REFERENCE, *(f"method {n}" for n in range(1, METHODS))]
    index = pd.MultiIndex.from_product([range(REGIMES), names, range(SEEDS)], names=["regime", "name", "seed"])
    return pd.Series(values.ravel(), index, name="sampled").reset_index()


def judge(shape: str, maps: int) -> dict[str, Any]:
    """Of so many maps: the share with a false winner, with its 95 % interval, and of covering intervals."""
    rng = np.random.default_rng([maps, list(SHAPES).index(shape)])
    found = [differences(noise_map(shape, rng), ("sampled",)) for _ in range(maps)]
    false = sum(bool((table.p_holm <= 0.05).any()) for table in found)
    low, high = binomtest(false, maps).proportion_ci(method="wilson")
    covers = np.mean([((table.low <= 0) & (table.high >= 0)).mean() for table in found])
    return {
        "noise": shape,
        "maps": maps,
        "false winners, %": round(100 * false / maps, 2),
        "95 %": [round(100 * low, 2), round(100 * high, 2)],
        "intervals that cover, %": round(100 * float(covers), 2),
    }


def main() -> None:
    """Simulate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=300)
    parser.add_argument("--shapes", nargs="+", default=["normal", "t, 4 degrees", "accuracy, sd 7.5 steps"])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    found = []
    for shape in given.shapes:
        found.append(judge(shape, given.maps))
        print(found[-1], flush=True)
    if given.output is not None:
        of = machine(packages=("numpy", "scipy", "pandas", "statsmodels"))
        given.output.write_text(json.dumps({"machine": of, "simulations": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
