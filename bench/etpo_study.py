"""ETPO against GRPO in one environment, with the same tokens.

    python -m bench.etpo_study --work runs/etpo_study --output bench/results/etpo_study.csv

The embedded agent adds numbers column by column. ETPO runs by the recipe of `hapo train --method etpo`, GRPO by
bench/compare/agents.yaml, once with one advantage for an episode and once with credit per turn, in which a turn is
compared with those of the episodes that came as far. A run ends with the update that reaches the budget of tokens.
The (policy's) learning rate is tuned for each arm on a seed of its own, by the success of its last quarter of
training episodes; held-out episodes are not looked at. Stopped, the same command goes on after the last whole run.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from hapo.cli import main as run
from hapo.insight.run import Run

from .verdicts import print_verdicts

ETPO = ["--method", "etpo", "--eval_size", 300, "--max_steps", 1000, "--logging_steps", 1,
        "--record_tokens_every", 0, "--save_steps", 1000]  # fmt: skip
GRPO = ["--config", Path(__file__).parent / "compare" / "agents.yaml", "--save_strategy", "no"]
ARMS: dict[str, tuple[list[Any], list[str]]] = {
    "etpo": (ETPO, ["7.5e-6", "1.5e-5", "3e-5", "6e-5"]),
    "grpo": (GRPO, ["1e-5", "3e-5", "1e-4"]),
    "grpo, credit per turn": (
        [*GRPO, "--method_options", '{"advantage": "turn_reward", "finished": "out"}'],
        ["1e-5", "3e-5", "1e-4"],
    ),
}
"""Flags, and the rates that are tried."""
REFERENCE = "grpo"
MEASURES = {"sampled after": "held-out success at the end, sampled", "greedy after": "the same, greedy"}
TUNING_SEED = 1001


def train(folder: Path, arm: str, rate: str, seed: int, budget: int) -> dict[str, Any]:
    """A run, and its line of the table."""
    flags, _ = ARMS[arm]
    if not (folder / "finished.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        words = ["train", *flags, "--seed", seed, "--learning_rate", rate, "--token_budget", budget,
                 "--evaluate_samples", 2, "--report", False, "--threads", 1, "--output_dir", folder]  # fmt: skip
        if code := run([str(word) for word in words]):
            raise SystemExit(code)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    done = Run(folder)
    assert done.finished is not None
    line: dict[str, Any] = {"arm": arm, "seed": seed, "rate": float(rate), **done.finished}
    for (step, how), at in done.evaluations.groupby(["step", "how"])["mean"]:
        line[f"{how} {'after' if step else 'before'}"] = at.item()
    last = done.metrics[done.metrics["num_tokens"] > 0.75 * budget]
    return {**line, "training": last["reward"].mean()}


def tuned(work: Path, arm: str, budget: int) -> str:
    """The rate whose last training episodes succeed most."""
    found = {}
    for rate in ARMS[arm][1]:
        found[rate] = train(work / "tuning" / slug(arm) / rate, arm, rate, TUNING_SEED, budget)["training"]
        print(f"tuning: {arm}, {rate}: {100 * found[rate]:.1f} % of the last training episodes", flush=True)
    return max(found, key=lambda rate: found[rate])


def slug(arm: str) -> str:
    return arm.replace(", ", "_").replace(" ", "_")


def main() -> None:
    """Run what is missing, print the verdicts, and write the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/etpo_study"))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--budget", type=int, default=100_000)
    parser.add_argument("--output", type=Path, default=Path("bench/results/etpo_study.csv"))
    given = parser.parse_args()
    rates = {arm: tuned(given.work, arm, given.budget) for arm in ARMS}
    print(json.dumps(rates))
    lines = [
        train(given.work / slug(arm) / f"seed-{seed}", arm, rates[arm], seed, given.budget)
        for seed in range(1, given.seeds + 1)
        for arm in ARMS
    ]
    runs = pd.DataFrame(lines)
    runs.to_csv(given.output, index=False)
    print_verdicts(runs, list(ARMS), REFERENCE, MEASURES)


if __name__ == "__main__":
    main()
