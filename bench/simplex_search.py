"""Regret of the search over weights against random search and a grid, at equal trials, on noisy functions.

    nice -n 19 python -m bench.simplex_search --seeds 24

Three weights, as `hapo shape` has them. A seed draws where the optimum lies and the noise of the measurements; all
contenders of a seed have the same function. Regret is the function's maximum less its value at the point that a
contender would hand on: the best measured one, or, where "+ surrogate" stands, the one with the highest mean under
the Gaussian process, which is what the search does.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import altair as alt
import pandas as pd
import torch

import hapo
from hapo.cli.held_out import read_lines
from hapo.engines.records import append_line
from hapo.insight.figures import Figure
from hapo.insight.statistics import compare_arms, mean_interval
from hapo.outputs import write_whole
from hapo.tasks.search import GaussianProcess, Trial, on_simplex, propose

CHANNELS, INITIAL = 3, 6
NOISE = 0.05
"""Standard deviation of a measurement; the functions reach from 0 to 1."""
GRIDS = {10: 3, 15: 4}
"""Trials -> steps along an edge: a lattice of exactly so many points."""

Point = tuple[float, ...]


def bump(w: Point, centre: Point, width: float) -> float:
    return math.exp(-sum((a - b) ** 2 for a, b in zip(w, centre, strict=True)) / (2 * width**2))


def function_of(kind: str, rng: random.Random) -> tuple[Callable[[Point], float], float]:
    """A function on the simplex and its maximum."""
    centre = drawn(rng)
    if kind == "inside":
        return lambda w: bump(w, centre, 0.3), 1.0
    chosen = rng.randrange(CHANNELS)
    corner = tuple(float(k == chosen) for k in range(CHANNELS))
    return lambda w: bump(w, corner, 0.5), 1.0


def drawn(rng: random.Random) -> Point:
    spacings = [rng.expovariate(1) for _ in range(CHANNELS)]
    return tuple(one / sum(spacings) for one in spacings)


def lattice(steps: int) -> list[Point]:
    return [
        (a / steps, b / steps, (steps - a - b) / steps) for a in range(steps + 1) for b in range(steps + 1 - a)
    ]


def measured(points: list[Point], function: Callable[[Point], float], noise: random.Random) -> list[Trial]:
    return [Trial(w, function(w) + noise.gauss(0, NOISE)) for w in points]


def searched(function: Callable[[Point], float], noise: random.Random, size: int, seed: int) -> list[Trial]:
    trials: list[Trial] = []
    while len(trials) < size:
        trials += measured([propose(trials, CHANNELS, INITIAL, seed)], function, noise)
    return trials


def regrets(kind: str, seed: int) -> list[dict[str, object]]:
    function, most = function_of(kind, random.Random(f"{kind}/{seed}"))

    def noise(who: str) -> random.Random:
        return random.Random(f"{kind}/{seed}/{who}")

    rows: list[dict[str, object]] = []

    def add(trials: int, who: str, point: Point) -> None:
        rows.append(
            {"function": kind, "seed": seed, "trials": trials, "who": who, "regret": most - function(point)}
        )

    generator = torch.Generator().manual_seed(seed)
    uniform = on_simplex(torch.rand(max(GRIDS), CHANNELS, generator=generator, dtype=torch.float64))
    by_chance = measured([tuple(w) for w in uniform.tolist()], function, noise("random"))
    by_search = searched(function, noise("search"), max(GRIDS), seed)
    for size, steps in GRIDS.items():
        add(size, "search", by_search[GaussianProcess(by_search[:size]).best].weights)
        for who, trials in (
            ("random", by_chance[:size]),
            ("grid", measured(lattice(steps), function, noise(f"grid{steps}"))),
        ):
            assert len(trials) == size
            add(size, who, max(trials, key=lambda trial: trial.value or -math.inf).weights)
            add(size, f"{who} + surrogate", trials[GaussianProcess(trials).best].weights)
    return rows


def figure(summary: list[dict[str, object]]) -> Figure:
    data = alt.Chart(
        alt.Data(values=[{**one, "of": f"{one['function']}, {one['trials']} trials"} for one in summary])
    )
    y = alt.Y("who:N", title=None, sort=["search", "grid", "grid + surrogate", "random", "random + surrogate"])
    bar = data.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title="regret"), x2="high:Q", y=y)
    dot = data.mark_point(filled=True, size=70, opacity=1).encode(x="regret:Q", y=y)
    shift, colour = alt.YOffset("of:N"), alt.Color("of:N", title=None)
    both = bar.encode(yOffset=shift, color=colour) + dot.encode(yOffset=shift, color=colour)
    return Figure(
        "regret", "Regret at equal trials", "Means over seeds with 95 % intervals; less is better.", both
    )


def main() -> None:
    """Measure, and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--work", type=Path, default=Path("runs/simplex_search.jsonl"), help="goes on from here")
    parser.add_argument("--figure", type=Path, default=Path("docs/images/simplex_search.svg"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/simplex_search.json"))
    told = parser.parse_args()
    torch.set_num_threads(1)
    told.work.parent.mkdir(parents=True, exist_ok=True)
    done = read_lines(told.work)
    for kind, seed in [(kind, seed) for seed in range(told.seeds) for kind in ("inside", "vertex")]:
        if any(one["function"] == kind and one["seed"] == seed for one in done):
            continue
        began = time.process_time()
        rows = regrets(kind, seed)
        done.append({"function": kind, "seed": seed, "rows": rows, "cpu": round(time.process_time() - began, 2)})
        append_line(told.work, done[-1])
        print(f"{kind}, seed {seed}: {done[-1]['cpu']} s of the processor", flush=True)
    rows = [row for one in done for row in one["rows"]]
    table = pd.DataFrame(rows)
    summary = []
    for (kind, size), some in table.groupby(["function", "trials"], sort=False):
        wide = some.pivot(index="seed", columns="who", values="regret")
        verdicts = compare_arms(wide, "search", better="lower", unit="regret", scale=1.0)
        for who in wide:
            found = mean_interval(wide[who])
            summary.append(
                {
                    "function": kind,
                    "trials": size,
                    "who": who,
                    "regret": found.mean,
                    "low": found.low,
                    "high": found.high,
                    "against search": "" if who == "search" else verdicts.loc[who, "verdict"],
                }
            )
    result = {
        "hapo": hapo.__version__,
        "botorch": metadata.version("botorch"),
        "torch": metadata.version("torch"),
        "machine": platform.platform(),
        "cpu_seconds": round(sum(one["cpu"] for one in done), 1),
        "noise": NOISE,
        "seeds": told.seeds,
        "summary": summary,
        "regrets": rows,
    }
    write_whole(told.out, json.dumps(result, indent=1) + "\n")
    figure(summary).save(told.figure, "svg")
    print(pd.DataFrame(summary).drop(columns="against search").to_string())
    for one in summary:
        print(one["function"], one["trials"], one["who"], one["against search"])


if __name__ == "__main__":
    main()
