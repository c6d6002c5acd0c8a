"""What a comparison found: arms x seeds of finished runs, as tables and words.

Reads a folder `runs/ARM/seed-N/` of run folders and nothing else, so that it works on runs of any engine. Held-out
accuracy is the sampled one of evaluations.jsonl; arms are paired by seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from .run import Run
from .statistics import Better, area_under_curve, compare_arms, first_reaching, pass_at_k, restrict

SAME_GRADIENT = 0.999
"""Cosine of first gradients from which two arms begin with the same update."""

FEW_CLIPPED = 1e-3
"""Share of clipped tokens below which the clip bounds do nothing."""

LITTLE = 0.01
"""Gain of held-out accuracy below which nothing was learned."""

UNEQUAL = 0.05
"""Share by which the tokens that arms generated may differ without a warning."""

NO_MOVE = 1e-7
"""Mean k3 divergence from the rollout policy, nats a token, below which all ratios are 1."""


@dataclass(frozen=True)
class Measure:
    """A column of the results that arms are compared by."""

    column: str
    title: str
    better: Better = "higher"
    scale: float = 1.0
    unit: str = ""


POINTS: dict[str, Any] = {"scale": 100.0, "unit": "points"}
MEASURES = (
    Measure("sampled", "held-out accuracy at the end, sampled", **POINTS),
    Measure("greedy", "held-out accuracy at the end, greedy", **POINTS),
    Measure("auc", "mean height of the accuracy curve over tokens", **POINTS),
    Measure("tokens_to_target", "tokens to the target accuracy", "lower", 1e-3, "thousand tokens"),
    Measure("seconds_to_target", "training seconds to the target accuracy", "lower", 1.0, "s"),
    Measure("entropy", "entropy at the end", "neither", 1.0, "nats"),
    Measure("length", "answer length at the end", "neither", 1.0, "tokens"),
)


@dataclass(frozen=True)
class Comparison:
    """The results of a folder of runs.

    Attributes:
        reference: the arm that the others are compared with.
        target: held-out accuracy, sampled, that `tokens_to_target` and `seconds_to_target` are about.
        runs: one row a run; the columns are described in docs/compare.md.
        curves: one row a measurement of a run.
        warnings: why the comparison cannot show a difference, where that can be known.
    """

    reference: str
    target: float
    runs: pd.DataFrame
    curves: pd.DataFrame
    warnings: list[str]

    @property
    def arms(self) -> list[str]:
        """In the order asked for."""
        return list(dict.fromkeys(self.runs["arm"]))

    def table(self, measure: Measure) -> pd.DataFrame | None:
        """The arms against the reference by one measure, as `compare_arms` gives it; None for a single arm."""
        if len(self.arms) < 2 or measure.column not in self.runs:
            return None
        wide = self.runs.pivot(index="seed", columns="arm", values=measure.column)[self.arms]
        return compare_arms(wide, self.reference, better=measure.better, unit=measure.unit, scale=measure.scale)

    @property
    def measures(self) -> list[Measure]:
        """Those that the runs have, with pass@k for every k sampled."""
        passes = [c for c in self.runs if c.startswith("pass@") and c != "pass@1"]
        more = [Measure(c, f"{c} at the end, sampled", **POINTS) for c in passes]
        return [m for m in (*MEASURES[:2], *more, *MEASURES[2:]) if m.column in self.runs]


def read_comparison(
    folders: dict[tuple[str, int], Path], reference: str, target: float | None = None
) -> Comparison:
    """The results of finished runs, (arm, seed) -> folder.

    `target` is by default half way from the start to the reference's mean accuracy at the end.

    Raises:
        ValueError: no finished run of the reference arm; a run without held-out accuracy; initial weights that
            differ between arms of a seed.
    """
    if not any(arm == reference for arm, _ in folders):
        raise ValueError(f"no finished run of the reference arm {reference!r}: its log.txt says why")
    found = {key: Run(folder) for key, folder in folders.items()}
    curves = pd.concat(
        [run.evaluations.drop(columns="scores").assign(arm=arm, seed=seed) for (arm, seed), run in found.items()],
        ignore_index=True,
    )
    _check_weights(found)
    sampled = curves[curves.how == "sampled"]
    if target is None:
        mine = sampled[sampled.arm == reference].groupby("seed")["mean"]
        target = round(float((mine.first().mean() + mine.last().mean()) / 2), 3)
    budget = sampled.groupby(["arm", "seed"])[["num_tokens", "seconds"]].last().min()
    rows = [_row(arm, seed, run, target, budget) for (arm, seed), run in found.items()]
    runs = pd.DataFrame(rows)
    runs["gradient_cosine"] = [_cosine(run, found.get((reference, seed))) for (_, seed), run in found.items()]
    return Comparison(reference, target, runs, curves, _warnings(runs, reference))


def _row(arm: str, seed: int, run: Run, target: float, budget: pd.Series) -> dict[str, Any]:
    sampled = run.evaluations[run.evaluations.how == "sampled"]
    greedy = run.evaluations[run.evaluations.how == "greedy"]
    if sampled.empty:
        raise ValueError(f"{run.folder} has no held-out accuracy: compare needs evaluate on")
    last, end = sampled.iloc[-1], run.finished or {}
    row: dict[str, Any] = {"arm": arm, "seed": seed, "start": sampled["mean"].iloc[0], "sampled": last["mean"]}
    row["greedy"] = greedy["mean"].iloc[-1]
    row["best"] = sampled["mean"].max()
    if last["binary"]:
        n = int(last["samples"])
        correct = np.rint(np.asarray(last["scores"]) * n)
        row |= {f"pass@{k}": float(pass_at_k(correct, n, k).mean()) for k in _powers(n)}
    curve = sampled.drop_duplicates("num_tokens", keep="last")  # tokens stand still within a rollout batch
    shared = curve[curve["num_tokens"] < budget["num_tokens"]]
    at_end = np.interp(budget["num_tokens"], curve["num_tokens"], curve["mean"])
    row["auc"] = area_under_curve([*shared["num_tokens"], budget["num_tokens"]], [*shared["mean"], at_end])
    for name, column in (("tokens", "num_tokens"), ("seconds", "seconds")):
        reached = first_reaching(curve[column], curve["mean"], target)
        restricted, arrived = restrict([reached], float(budget[column]))
        row[f"{name}_to_target"] = float(restricted[0])
        if name == "tokens":
            row["reached"] = bool(arrived[0])
    best = sampled.loc[sampled["mean"].idxmax()]
    row["collapsed"] = bool(last["high"] < best["low"])
    row |= {"steps": end.get("steps"), "num_tokens": end.get("num_tokens"), "seconds": end.get("seconds")}
    return row | _training(run.metrics)


def _training(metrics: pd.DataFrame) -> dict[str, float]:
    """Figures of training: the last tenth of the steps for the state, all of them for the shares."""
    tail = metrics.tail(max(1, len(metrics) // 10))
    ends = {"entropy": "entropy", "length": "completions/mean_length"}
    shares = {"clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean", "kl_old": "kl_old"}
    values = {name: float(tail[key].mean()) for name, key in ends.items() if key in metrics}
    values |= {name: float(metrics[key].mean()) for name, key in shares.items() if key in metrics}
    return values


def _powers(n: int) -> list[int]:
    return [2**i for i in range(n.bit_length()) if 2**i <= n]


def _cosine(run: Run, other: Run | None) -> float:
    files = [r.folder / "first_gradient.safetensors" for r in (run, other) if r is not None]
    if len(files) < 2 or not all(file.is_file() for file in files):
        return math.nan
    a, b = (load_file(file)["gradient"].astype(np.float64) for file in files)
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if len(a) == len(b) and size else math.nan


def _check_weights(runs: dict[tuple[str, int], Run]) -> None:
    first: dict[int, tuple[str, str]] = {}  # a seed decides how adapters are initialised
    for (arm, seed), run in runs.items():
        weights = str(run.manifest.get("weights_sha256", ""))
        other, theirs = first.setdefault(seed, (arm, weights))
        if weights != theirs:
            raise ValueError(
                f"{other} and {arm} began with different weights in seed {seed}: compare runs of one model, in a "
                "fresh folder"
            )


def _warnings(runs: pd.DataFrame, reference: str) -> list[str]:
    """Reasons why arms cannot differ."""
    found = []
    by_arm = runs.groupby("arm", sort=False)
    cosine = by_arm["gradient_cosine"].mean()
    for arm, value in cosine.items():
        if arm != reference and value >= SAME_GRADIENT:
            found.append(
                f"{arm} and {reference} begin with the same update (cosine of first gradients {value:.5f}): what "
                "they differ by does not act on these responses at ratio 1; more updates a rollout batch, lengths "
                "that vary within groups, or graded rewards would show it"
            )
    if "clip_low" in runs:
        clipped = (by_arm["clip_low"].mean() + by_arm["clip_high"].mean()).dropna()
        still = clipped[clipped < FEW_CLIPPED]
        if len(still):
            found.append(
                f"next to nothing is clipped ({', '.join(f'{a} {100 * v:.2g} %' for a, v in still.items())} "
                "of the tokens): methods that act by their bounds cannot show it; raise steps_per_generation or "
                "learning_rate"
            )
    if "kl_old" in runs:
        moved = by_arm["kl_old"].mean().dropna()
        for arm in moved[moved < NO_MOVE].index:
            found.append(
                f"{arm}: the policy never leaves the rollout policy, every ratio is 1; raise steps_per_generation "
                "or num_iterations"
            )
    ends = by_arm[["start", "sampled"]].mean()
    if ((ends["sampled"] - ends["start"]) < LITTLE).all():
        found.append("no arm learned anything (under one point): train longer, or raise the learning rate")
    tokens = by_arm["num_tokens"].mean().dropna()
    if len(tokens) and tokens.max() > (1 + UNEQUAL) * tokens.min():
        found.append(
            f"the budgets are not equal: {tokens.idxmax()} generated {tokens.max():,.0f} tokens a run, "
            f"{tokens.idxmin()} {tokens.min():,.0f}; set token_budget, and compare by the curve over tokens"
        )
    return found
