"""Processor seconds of training until a held-out accuracy is reached: HAPO, and TRL's own DAPO and GRPO.

    python -m bench.time_to_target --output bench/results/time_to_target.json

The embedded task and model near the rollout policy (bench/compare/near_policy.yaml), measured every two rollout
batches; measuring, loading and records of single tokens are in no second. Paired seeds, one thread, arms in turns.
The learning rate of each arm is that which docs/evidence/comparison.md tuned for it: 3e-5 for all three.
Seconds at the target are interpolated between two measurements; ratios are of pairs, with the bootstrap-t
interval of their logarithms.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from rich.console import Console

from hapo.cli.arms import Arm, Job, Recipe
from hapo.cli.held_out import Course, HeldOut
from hapo.cli.one_run import build
from hapo.cli.recipe import read_recipe
from hapo.insight.run import Run
from hapo.insight.statistics import first_reaching, mean_interval, paired_difference

from .paired import machine, summary

ROOT = Path(__file__).parents[1]
RATE = 3e-5
ARMS = ("hapo", "trl:dapo", "trl:grpo")
FIGURES = ("seconds to target", "tokens to target", "accuracy at the end", "seconds")


def train(job: Job) -> None:
    """One run; its evaluations.jsonl has processor seconds."""
    built = build(job)
    trainer, options = built.trainer, built.options
    course = Course(job.folder, options.token_budget, clock=time.process_time)
    held_out = HeldOut(
        trainer,
        built.task.eval,
        built.task.reward_funcs,
        course,
        Console(quiet=True),
        every=options.evaluate_every,
        samples=options.evaluate_samples,
    )
    for callback in (course, held_out):
        trainer.add_callback(callback)
    held_out.measure(0)
    trainer.train()
    held_out.measure(trainer.state.global_step)
    course.finish(trainer.state)


def curve(folder: Path, target: float) -> dict[str, Any]:
    """What one run came to."""
    run = Run(folder)
    found = run.evaluations
    sampled = found[found.how == "sampled"].drop_duplicates("num_tokens", keep="last")
    return {
        "seconds to target": float(first_reaching(sampled["seconds"], sampled["mean"], target)),
        "tokens to target": float(first_reaching(sampled["num_tokens"], sampled["mean"], target)),
        "accuracy at the end": float(sampled["mean"].iloc[-1]),
        "seconds": float(sampled["seconds"].iloc[-1]),
        "curve": sampled[["seconds", "num_tokens", "mean"]].round(4).to_numpy().tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=ARMS, help="ratios are of the first to each of the others")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument(
        "--target", type=float, default=0.42, help="three quarters of DAPO's gain in the comparison"
    )
    parser.add_argument("--evaluate_every", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    recipe = Recipe(read_recipe(str(ROOT / "bench" / "compare" / "near_policy.yaml")), [])
    flags = {"learning_rate": RATE, "evaluate_every": given.evaluate_every}
    context = multiprocessing.get_context("spawn")
    begin = machine(packages=("torch", "trl", "transformers"))
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in given.arms}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, given.seeds + 1):
            for arm in given.arms if seed % 2 else reversed(given.arms):
                job = Job(Arm(arm), seed, Path(folder) / f"{Arm(arm).slug}-{seed}", recipe, flags)
                process = context.Process(target=train, args=(job,))
                process.start()
                process.join()
                if process.exitcode:
                    raise RuntimeError(f"{arm}, seed {seed}: exit code {process.exitcode}")
                runs[arm].append(curve(job.folder, given.target))
                print(f"seed {seed} {arm}: {[runs[arm][-1][key] for key in FIGURES]}", flush=True)
    first, *others = given.arms
    result: dict[str, Any] = {
        "machine": {**begin, "load_after": machine()["load"]},
        "settings": {"seeds": given.seeds, "target": given.target, **flags},
        "runs": runs,
        "arms": {arm: {key: summary([run[key] for run in of]) for key in FIGURES} for arm, of in runs.items()},
        "ratios": {f"{first} / {arm}": ratio(runs[first], runs[arm]) for arm in others},
    }
    print(table(result))
    given.output.write_text(json.dumps(result, indent=1) + "\n")


def ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Geometric mean of the pairs' ratios with its interval; a pair counts where both reached the target."""
    found = {}
    for key in ("seconds to target", "tokens to target", "seconds"):
        a, b = (np.array([run[key] for run in of]) for of in (ours, theirs))
        both = np.isfinite(a) & np.isfinite(b)
        gap = paired_difference(np.log(a[both]), np.log(b[both]))
        found[key] = [round(math.exp(x), 3) for x in (gap.mean, gap.low, gap.high)] + [int(both.sum())]
    return found


def table(result: dict[str, Any]) -> str:
    lines = [f"{'arm':12}{'CPU s to target':>18}{'tokens':>10}{'CPU s in all':>14}{'accuracy at the end, %':>26}"]
    for arm, of in result["arms"].items():
        end = mean_interval([100 * run["accuracy at the end"] for run in result["runs"][arm]])
        lines.append(
            f"{arm:12}{of['seconds to target']['median']:18.2f}{of['tokens to target']['median']:10.0f}"
            f"{of['seconds']['median']:14.1f}{end.mean:12.1f} [{end.low:.1f}, {end.high:.1f}]"
        )
    for name, found in result["ratios"].items():
        for key, (middle, low, high, n) in found.items():
            lines.append(f"{name:20}{key:20}{middle:6.2f} [{low:.2f}, {high:.2f}], {n} pairs")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
