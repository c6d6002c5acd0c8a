"""Draws the curves of a run folder: accuracy, entropy, clip shares and length over optimiser steps.

    python scripts/plot_run.py RUN --out FILE.svg [--csv FILE.csv]

Reads RUN/metrics.jsonl and, where it exists, RUN/evaluation.json (held-out accuracy before and after). Needs
matplotlib. With --csv the plotted figures are written too, one line an optimiser step.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

COLUMNS = {
    "step": "step",
    "reward": "reward",
    "entropy": "entropy",
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
    "length": "completions/mean_length",
    "groups_used": "groups/used",
    "seconds": "wall_seconds",
}
"""Column of the CSV -> key of metrics.jsonl. What belongs to a rollout stands on the first of its steps."""

WINDOW = 5
"""Logged values that a thick line averages over."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The optimiser steps of a run, with the names of COLUMNS; None where nothing is logged."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if COLUMNS["entropy"] in line]
    if not steps:
        raise SystemExit(f"{run / 'metrics.jsonl'} has no optimiser steps yet")
    return [{name: line.get(key) for name, key in COLUMNS.items()} for line in steps]


def write_csv(steps: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS), lineterminator="\n")
        writer.writeheader()
        for step in steps:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in step.items()})


def smooth(values: list[float]) -> list[float]:
    """Mean over the last WINDOW values; over fewer at the start."""
    windows = [values[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def plot(steps: list[dict[str, Any]], held_out: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.5), sharex=True, layout="constrained")
    reward, entropy, clipped, length = axes.flat

    def draw(axis: Any, name: str, colour: str, label: str | None = None, scale: float = 1.0) -> None:
        points = [(step["step"], scale * step[name]) for step in steps if step[name] is not None]
        x, y = [list(column) for column in zip(*points, strict=True)]
        axis.plot(x, y, color=colour, alpha=0.35, linewidth=1)
        axis.plot(x, smooth(y), color=colour, linewidth=2, label=label)

    draw(reward, "reward", "tab:blue", f"training, mean of {WINDOW} rollouts")
    reward.set_title("reward")
    ends = {"before": 0, "after": steps[-1]["step"]}
    for how, colour in (("sampled", "black"), ("greedy", "tab:red")):
        for i, when in enumerate(when for when in ends if when in held_out):
            found = held_out[when][how]
            reward.errorbar(
                ends[when],
                found["mean"],
                [[found["mean"] - found["low"]], [found["high"] - found["mean"]]],
                fmt="o",
                capsize=4,
                color=colour,
                label=f"held out, {how}, 95 %" if i == 0 else None,
            )
    reward.legend(fontsize=8)
    draw(entropy, "entropy", "tab:green")
    entropy.set_title("entropy of the trained tokens, nats")
    draw(clipped, "clip_low", "tab:purple", "low", 100)
    draw(clipped, "clip_high", "tab:orange", "high", 100)
    clipped.set_title("clipped tokens, %")
    clipped.legend(fontsize=8)
    draw(length, "length", "tab:brown")
    length.set_title("answer length, tokens")
    for axis in axes[1]:
        axis.set_xlabel("optimiser step")
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    plt.rcParams["svg.hashsalt"] = "hapo"
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder, as `hapo train` leaves it")
    parser.add_argument("--out", type=Path, required=True, help="SVG to write")
    parser.add_argument("--csv", type=Path, help="CSV to write")
    given = parser.parse_args()

    steps = read_metrics(given.run)
    evaluation = given.run / "evaluation.json"
    plot(steps, json.loads(evaluation.read_text()) if evaluation.exists() else {}, given.out)
    if given.csv:
        write_csv(steps, given.csv)


if __name__ == "__main__":
    main()
