"""HAPO's C, and a variant of it, against DAPO (docs/evidence/map.md, "HAPO's C, and a variant").

    python -m bench.variant_study [--regimes near far]

The regimes are the map's, with its tuned rates: bench/results/method_map_tuning.csv has to have them.
Adds the runs to bench/results/variant_study.csv; what is in there is not run again. Stopped, the same command
goes on.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hapo.cli import main as run
from hapo.method import Method
from hapo.methods import register
from hapo.methods.hapo import HAPO
from hapo.parts.shaping import redistribute
from hapo.stage import Stage

from .method_map import OF_THE_CALL, RECIPES, RESULTS, add, at_rate, machine, rates_of, read, recipe_of
from .verdicts import print_verdicts

OUTPUT = RESULTS.with_name("variant_study.csv")
ARMS = {
    "dapo": "dapo",
    "hapo": "hapo",
    "hapo:components=ABD": "hapo without C",
    "hapo_balanced": "balanced: certain tokens damped in wrong answers",
    "hapo_mirror": "mirror: damped in right answers",
}
"""Arm -> what it is called in the file."""


class Damping(HAPO):
    """HAPO whose C damps certain tokens in answers of one sign alone."""

    spared: ClassVar[int]
    """Sign of the advantages that are left alone."""

    def build(self) -> Method:
        """HAPO's stages, but for the redistribution."""
        zone = Stage(
            redistribute_one_sign, "advantage", "ratio", "signal", low=self.eps_low, high=self.eps_high,
            beta=self.beta, spared=self.spared,
        )  # fmt: skip
        return super().build().replace(shaping=zone)


@register("hapo_balanced")
@dataclass(frozen=True, kw_only=True)
class Balanced(Damping):
    """Certain tokens of right answers keep their advantage."""

    spared: ClassVar = 1


@register("hapo_mirror")
@dataclass(frozen=True, kw_only=True)
class Mirror(Damping):
    """Certain tokens of wrong answers keep their advantage."""

    spared: ClassVar = -1


def redistribute_one_sign(
    advantage: Float[Tensor, "B T"],
    ratio: Float[Tensor, "B T"],
    signal: Float[Tensor, "B T"],
    low: float,
    high: float,
    beta: float,
    spared: int,
) -> Float[Tensor, "B T"]:
    """`redistribute`, but for tokens with h <= 0 whose advantage has the sign `spared`."""
    shaped = redistribute(advantage, ratio, signal, low, high, beta)
    return torch.where((signal <= 0) & (advantage * spared > 0), advantage, shaped)


def run_regime(regime: str, seeds: int, work: Path) -> None:
    """The runs of a regime, if they are not there."""
    if not read(OUTPUT, regime).empty:
        return
    recipe_of(regime)
    rates = rates_of(regime)
    arms = {at_rate(arm, rates[arm.split(":")[0].split("_")[0]]): name for arm, name in ARMS.items()}
    folder = work / regime
    words = ["compare", "--config", RECIPES / f"{regime}.yaml", "--output_dir", folder, "--arms", *arms,
             "--reference", next(iter(arms)), "--seeds", seeds, "--jobs", 1]  # fmt: skip
    if code := run([str(word) for word in words]):
        raise SystemExit(code)
    rows = pd.read_csv(folder / "results.csv").drop(columns=OF_THE_CALL, errors="ignore")
    rows = rows.assign(
        regime=regime,
        method=rows.arm.map(arms),
        machine=machine(),
        learning_rate=[float(arm.split("learning_rate=")[1]) for arm in rows.arm],
    ).drop(columns="arm")
    add(OUTPUT, rows)


def main() -> None:
    """Run what is missing, and print the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regimes", nargs="+", default=["near", "far"])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--work", type=Path, default=Path("runs/variant"))
    given = parser.parse_args()
    for regime in given.regimes:
        run_regime(regime, given.seeds, given.work)
        runs = read(OUTPUT, regime).rename(columns={"method": "arm"})
        print(f"\n{regime}")
        print_verdicts(
            runs, list(ARMS.values()), "dapo", {"sampled": "sampled accuracy", "greedy": "greedy accuracy"}
        )


if __name__ == "__main__":
    main()
