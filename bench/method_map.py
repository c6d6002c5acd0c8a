"""The map: policy methods in several regimes, rates tuned for each, paired seeds (docs/evidence/map.md).

    python -m bench.method_map [--regimes near far ...] [--seeds 12] [--block 3] [--jobs 1]

A regime is a recipe of `hapo compare`, bench/map/REGIME.yaml, with its arms. The rates are tuned with the first
block of seeds; each block is added to bench/results/method_map.csv as it ends. What is in there is not run again:
the same command goes on where it was stopped, from a fresh clone, too. The models that are not bundled are made
first, in models/.

    python -m bench.method_map --again 3

runs three rows of the file once more, chosen at random among those of this kind of processor, and fails where one
is not the same to the last bit.
"""

from __future__ import annotations

import argparse
import platform
import random
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

RECIPES = Path(__file__).parent / "map"
RESULTS = Path(__file__).parent / "results" / "method_map.csv"
TUNING = RESULTS.with_stem("method_map_tuning")
REGIMES = ("near", "far", "sparse", "long", "mismatch", "mixture")
TINY = "scripts/make_tiny_model.py --steps"
MODELS = {
    "models/tiny-early": f"{TINY} 176 --out models/tiny-early",
    "models/tiny-rounds": f"{TINY} 260 --out models/tiny-rounds --rounds 0.2 0.4 0.4",
    "models/tiny-long": f"{TINY} 260 --out models/tiny-long --rounds 0.1 0.2 0.2 0.25 0.25",
    "models/mixture/warm_up/model": "-m bench.sent_study --model_only --work models/mixture",
}
"""Model -> what Python is told, to make it."""
CELL = ["regime", "method", "seed"]
OF_THE_CALL = ["best", "auc", "tokens_to_target", "reached", "seconds_to_target"]
"""Columns of results.csv that depend on the other runs of a call, or say nothing of a start and an end."""
NOT_AGAIN = ["machine", "seconds", "gradient_cosine"]
"""Columns that a run alone does not repeat."""


def recipe_of(regime: str) -> dict[str, Any]:
    """The recipe of a regime, its model made."""
    recipe = yaml.safe_load((RECIPES / f"{regime}.yaml").read_text())
    model = recipe["model_name_or_path"]
    if model in MODELS and not Path(model).is_dir():
        subprocess.run([sys.executable, *MODELS[model].split()], check=True)
    return recipe


def at_rate(method: str, rate: float) -> str:
    """The arm of a method with its rate."""
    return f"{method}{',' if '=' in method else ':'}learning_rate={rate:g}"


def machine() -> str:
    """The processor, by whose kind the last bits of a run may differ."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.machine()


def compare(regime: str, folder: Path, *words: object) -> pd.DataFrame:
    """The runs of one call of `hapo compare`.

    Raises:
        CalledProcessError: it could not begin. Where a run failed it says so and goes on.
    """
    command = ["compare", "--config", RECIPES / f"{regime}.yaml", "--output_dir", folder, *words]
    done = subprocess.run([sys.executable, "-m", "hapo.cli", *map(str, command)])
    if done.returncode and not (folder / "results.csv").is_file():
        done.check_returncode()
    return pd.read_csv(folder / "results.csv").drop(columns=OF_THE_CALL, errors="ignore")


def read(file: Path, regime: str) -> pd.DataFrame:
    """The rows of a regime; none where there is no file yet."""
    rows = pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=[*CELL, "learning_rate", "sampled"])
    return rows[rows.regime == regime]


def add(file: Path, rows: pd.DataFrame) -> None:
    """Append rows; columns in the file's order, in a new one those of a cell first."""
    before = [pd.read_csv(file)] if file.is_file() else []
    first = [name for name in (*CELL, "learning_rate", "machine") if name in rows]
    rows = rows[[*first, *(name for name in rows if name not in first)]]
    pd.concat([*before, rows], ignore_index=True).to_csv(file, index=False)


def rates_of(regime: str) -> dict[str, float]:
    """The best rate of each method that was tuned; of equal ones the lower."""
    tuned = read(TUNING, regime).groupby(["method", "learning_rate"]).sampled.mean()
    return {str(method): float(of.droplevel(0).idxmax()) for method, of in tuned.groupby("method")}


def run_block(regime: str, methods: Collection[str], seeds: range, work: Path, jobs: int) -> None:
    """The missing runs of some seeds; with the first block the tuning of what is not tuned."""
    recipe, known = recipe_of(regime), rates_of(regime)
    there = {(row.method, row.seed) for row in read(RESULTS, regime).itertuples()}
    missing = [method for method in methods if any((method, seed) not in there for seed in seeds)]
    if not missing:
        return
    arms = {at_rate(method, known[method]) if method in known else method: method for method in missing}
    reference = next(arm for arm in arms if arm.startswith("dapo")) if "dapo" in missing else next(iter(arms))
    folder = work / regime / f"{seeds[0]}-{seeds[-1]}"
    made = compare(
        regime, folder, "--arms", *arms, "--reference", reference, "--first_seed", seeds[0], "--seeds", len(seeds),
        "--jobs", jobs,
    )  # fmt: skip
    if any(method not in known for method in missing):
        tuned = pd.read_csv(folder / "tuning.csv")
        add(TUNING, tuned.rename(columns={"arm": "method"}).assign(regime=regime, machine=machine()))
        known = rates_of(regime)
    made = made.assign(regime=regime, method=made.arm.map(arms), machine=machine()).drop(columns="arm")
    made = made.assign(learning_rate=made.method.map(known))
    made = made[[(row.method, row.seed) not in there for row in made.itertuples()]]
    add(RESULTS, made)
    print(f"{regime}: {len(recipe['arms'])} methods, seeds {seeds[0]} to {seeds[-1]} done", flush=True)


def run_again(count: int, work: Path) -> bool:
    """Whether rows of this kind of processor, drawn at random, come out the same, one run each."""
    rows = pd.read_csv(RESULTS, dtype=str)
    rows = rows[rows.machine == machine()]
    same = True
    for at in random.SystemRandom().sample(range(len(rows)), count):
        row = rows.iloc[at]
        arm = at_rate(row.method, float(row.learning_rate))
        recipe_of(row.regime)
        folder = work / "again" / str(at)
        made = compare(row.regime, folder, "--arms", arm, "--first_seed", row.seed, "--seeds", 1, "--jobs", 1)
        made.to_csv(work / "again.csv", index=False)
        new = pd.read_csv(work / "again.csv", dtype=str).iloc[0]
        names = [name for name in new.index if name in rows and name not in (*NOT_AGAIN, *CELL)]
        differing = [f"{n}: {row[n]}, now {new[n]}" for n in names if row[n] != new[n] and pd.notna(row[n])]
        print(f"{row.regime}, {arm}, seed {row.seed}: {'; '.join(differing) or 'the same'}", flush=True)
        same &= not differing
    return same


def main() -> int:
    """Run what is missing, or some of it again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=REGIMES)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--block", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/map"))
    parser.add_argument("--again", type=int, default=0, metavar="ROWS")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.again:
        return 0 if run_again(given.again, given.work) else 1
    for regime in given.regimes:
        methods = recipe_of(regime)["arms"]
        for first in range(1, given.seeds + 1, given.block):
            seeds = range(first, min(first + given.block, given.seeds + 1))
            run_block(regime, methods, seeds, given.work, given.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
