"""EGSPO and CHORD-phi against GRPO, with and without a warm-up on demonstrations first.

    python -m bench.egspo_study --work runs/egspo_study --output bench/results/egspo_study.csv

Two comparisons of `hapo compare` on bench/compare/near_policy.yaml, with the same seeds, problems and
measurements: one from the bundled model, one from that model after a short `hapo sft`, whose tokens are taken off
the budget of the runs that begin with it. Each arm has a learning rate of its own. The reference is "sft, then
grpo": a re-examination of mixed methods (arXiv 2604.23747) finds that it beats them. Stopped, the same command
goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd

from hapo.cli import main as run

from .verdicts import print_verdicts

RECIPE = Path(__file__).parent / "compare" / "near_policy.yaml"
BUDGET = 87_000
"""Tokens of a run, its warm-up included."""

GRPO = "grpo:beta=0.0"
CHORD = f"{GRPO},demonstration_weight=0.1,demonstration_method=chord_phi"
ARMS = {
    ("tiny", GRPO): "grpo",
    ("tiny", CHORD): "chord_phi",
    ("warm", GRPO): "sft, then grpo",
    ("warm", CHORD): "sft, then chord_phi",
    ("warm", "egspo:attenuation=const"): "egspo, const",
    ("warm", "egspo"): "egspo, chord_phi",
}
REFERENCE = "sft, then grpo"
MEASURES = {"sampled": "held-out accuracy at the end, sampled", "greedy": "the same, greedy"}


def hapo(*words: object) -> None:
    """A command that has to succeed."""
    if code := run([str(word) for word in words]):
        raise SystemExit(code)


def warm_up(folder: Path) -> int:
    """The model in `folder`/model; the tokens that it has learnt from."""
    if not (folder / "model").is_dir():
        hapo("sft", "--method", "sft", "--max_steps", 8, "--warmup_steps", 0, "--learning_rate", 1e-5,
             "--threads", 1, "--output_dir", folder)  # fmt: skip
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return int(max(line.get("eval_num_tokens", 0) for line in lines))


def main() -> None:
    """Run what is missing, print the verdicts, and write the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/egspo_study"))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--rates", nargs="+", default=["1e-5", "3e-5", "1e-4"])
    parser.add_argument("--output", type=Path, default=Path("bench/results/egspo_study.csv"))
    given = parser.parse_args()
    spent = warm_up(given.work / "warm_up")
    starts: dict[str, tuple[Any, int]] = {
        "tiny": ("tiny", BUDGET),
        "warm": (given.work / "warm_up" / "model", BUDGET - spent),
    }
    tables = []
    for start, (model, budget) in starts.items():
        arms = [arm for of, arm in ARMS if of == start]
        hapo("compare", "--config", RECIPE, "--model_name_or_path", model, "--token_budget", budget,
             "--demonstrations", "addition", "--demonstration_weight", 0, "--arms", *arms, "--reference", GRPO,
             "--seeds", given.seeds, "--tune", *given.rates, "--tune_seeds", 1, "--jobs", 1,
             "--output_dir", given.work / start)  # fmt: skip
        table = pd.read_csv(given.work / start / "results.csv")
        labels = {arm: label for (of, arm), label in ARMS.items() if of == start}
        tables.append(table.assign(start_model=start, arm=table.arm.map(labels)))
    runs = pd.concat(tables)
    runs.to_csv(given.output, index=False)
    print_verdicts(runs, list(ARMS.values()), REFERENCE, MEASURES)


if __name__ == "__main__":
    main()
