"""What a step of each method moves: the norm of its update of the weights, per token that counts.

    python -m bench.map_updates [--regimes near far ...]

Trains each method of the map at its tuned rate, bench/results/method_map_tuning.csv, for some optimiser steps and
measures nothing else. Writes a row a step to bench/results/map_updates.csv; regimes that are in there are left.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import TrainerCallback

from hapo.cli.arms import Arm, Job, Recipe
from hapo.cli.one_run import LogLines, build
from hapo.cli.recipe import read_recipe

from .method_map import RECIPES, REGIMES, RESULTS, add, at_rate, machine, rates_of, read, recipe_of

OUTPUT = RESULTS.with_name("map_updates.csv")
OF_THE_COMPARISON = ("arms", "seeds", "tune", "tune_seeds")
"""What a regime's recipe holds beside the options of a run."""
TUNE_SIZE = 200
"""Training problems that the map's runs set aside; so these runs begin with the same batches."""


class Updates(TrainerCallback):
    """The norm of every update, and the tokens that count in it."""

    def __init__(self, trainer: Any) -> None:
        self.rows: list[dict[str, float]] = []
        self._kept = 0
        others = trainer.auxiliary_losses

        def counted(batch: Any, scored: Any) -> Any:
            self._kept = batch.totals.kept
            return others(batch, scored)

        trainer.auxiliary_losses = counted

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._before = _weights(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        moved = (_weights(model) - self._before).norm().item()
        self.rows.append({"step": state.global_step + 1, "update_norm": moved, "kept_tokens": self._kept})


def _weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def updates(regime: str, seeds: int, steps: int) -> Iterator[dict[str, Any]]:
    """A row for each step of each method and seed."""
    recipe, rates = recipe_of(regime), rates_of(regime)
    if missing := [method for method in recipe["arms"] if method not in rates]:
        raise SystemExit(f"{regime}: not tuned yet: {', '.join(missing)}; python -m bench.method_map does it")
    options = read_recipe(str(RECIPES / f"{regime}.yaml"))
    options = {name: value for name, value in options.items() if name not in OF_THE_COMPARISON}
    for method in recipe["arms"]:
        for seed in range(1, seeds + 1):
            with tempfile.TemporaryDirectory() as folder:
                arm = Arm(at_rate(method, rates[method]))
                job = Job(
                    arm, seed, Path(folder) / "run", Recipe(options, []), {"max_steps": steps}, tune_size=TUNE_SIZE
                )
                trainer = build(job).trainer
                trainer.remove_callback(LogLines)
                seen = Updates(trainer)
                trainer.add_callback(seen)
                trainer.train()
                yield from ({"regime": regime, "method": method, "seed": seed, "learning_rate": rates[method],
                             "machine": machine(), **row} for row in seen.rows)  # fmt: skip


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=REGIMES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()
    for regime in given.regimes:
        if OUTPUT.is_file() and not read(OUTPUT, regime).empty:
            continue
        add(OUTPUT, pd.DataFrame(updates(regime, given.seeds, given.steps)))
        print(f"{regime}: done", flush=True)


if __name__ == "__main__":
    main()
