"""What a comparison found: arms x seeds of finished runs, as tables and words.

Reads run folders and nothing else, so that it works on runs of any engine. Held-out accuracy is the sampled one of
evaluations.jsonl, or the greedy one where a run has no other; arms are paired by seed.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from .run import Run, of_runs
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
        target: held-out accuracy that `tokens_to_target` and `seconds_to_target` are about; None where none lies
            above the start of every run, which leaves these columns out.
        runs: one row a run; the columns are described in docs/compare_reference.md.
        curves: one row a measurement of a run.
        warnings: why the comparison cannot show a difference, where that can be known.
        how: the answers that accuracy is of, `sampled` or, where not every run has sampled ones, `greedy`; the
            column of `runs` that holds it at the end.
        of: a hash of which runs these are.
    """

    reference: str
    target: float | None
    runs: pd.DataFrame
    curves: pd.DataFrame
    warnings: list[str]
    how: str
    of: str

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
    def accuracies(self) -> list[Measure]:
        """At the end: sampled, greedy, or both, as all runs have them."""
        return [m for m in MEASURES[:2] if m.column in self.runs]

    @property
    def measures(self) -> list[Measure]:
        """Those that the runs have, with pass@k for every k sampled."""
        passes = [c for c in self.runs if c.startswith("pass@") and c != "pass@1"]
        more = [Measure(c, f"{c} at the end, sampled", **POINTS) for c in passes]
        return [*self.accuracies, *more, *(m for m in MEASURES[2:] if m.column in self.runs)]


def read_comparison(
    folders: dict[tuple[str, int], Path], reference: str, target: float | None = None
) -> Comparison:
    """The results of finished runs, (arm, seed) -> folder.

    `target` is by default half way from the start to the reference's mean accuracy at the end. One that a run
    begins with would be reached at 0 tokens: it is none.

    Raises:
        ValueError: no finished run of the reference arm; a run without a curve of held-out accuracy; runs
            measured in different ways, or on different numbers of problems; initial weights that differ between
            arms of a seed.
    """
    if not any(arm == reference for arm, _ in folders):
        raise ValueError(f"no finished run of the reference arm {reference!r}: its log.txt says why")
    found = {key: Run(folder) for key, folder in folders.items()}
    hows = _measured(found.values())
    curves = pd.concat(
        [run.evaluations.drop(columns="scores").assign(arm=arm, seed=seed) for (arm, seed), run in found.items()],
        ignore_index=True,
    )
    _check_weights(found)
    accuracy = curves[curves.how == hows[0]]
    _check_problems(accuracy)
    target, without = _target(accuracy, reference, target)
    budget = accuracy.groupby(["arm", "seed"])[["num_tokens", "seconds"]].last().min()
    runs = pd.DataFrame([_row(arm, seed, run, target, budget, hows) for (arm, seed), run in found.items()])
    runs["gradient_cosine"] = [_cosine(run, found.get((reference, seed))) for (_, seed), run in found.items()]
    warnings = _warnings(runs, curves, reference, hows[0], without)
    return Comparison(reference, target, runs, curves, warnings, hows[0], of_runs(found.values()))


def _target(accuracy: pd.DataFrame, reference: str, asked: float | None) -> tuple[float | None, str]:
    """The accuracy to reach; or none, and why."""
    mine = accuracy[accuracy.arm == reference].groupby("seed")["mean"]
    target = round(float((mine.first().mean() + mine.last().mean()) / 2), 3) if asked is None else asked
    start = float(accuracy.groupby(["arm", "seed"])["mean"].first().max())
    if target > start:
        return target, ""
    what = f"half of {reference}'s gain, {100 * target:.1f} %," if asked is None else f"{100 * target:.1f} %"
    return None, (
        f"there is no target: {what} is not above the start, where a run had {100 * start:.1f} %; name a higher "
        "one with --target"
    )


def _measured(runs: Collection[Run]) -> list[str]:
    """The ways in which every run was measured, the one to compare by first."""
    for run in runs:
        if run.evaluations["num_tokens"].nunique() < 2:
            raise ValueError(
                f"{run.folder} has no curve of held-out accuracy, measured twice at least: compare needs evaluate "
                "on (verl: trainer.test_freq)"
            )
    hows = [how for how in ("sampled", "greedy") if all(how in set(run.evaluations["how"]) for run in runs)]
    if not hows:
        one, other = (
            next(run.folder for run in runs if how not in set(run.evaluations["how"]))
            for how in ("sampled", "greedy")
        )
        raise ValueError(
            f"{one} has no accuracy of sampled answers and {other} none of greedy ones: measure both runs alike "
            "(verl: actor_rollout_ref.rollout.val_kwargs.temperature)"
        )
    return hows


def _row(
    arm: str, seed: int, run: Run, target: float | None, budget: pd.Series, hows: list[str]
) -> dict[str, Any]:
    measured = {how: run.evaluations[run.evaluations.how == how] for how in hows}
    lines = measured[hows[0]]
    last, end = lines.iloc[-1], run.finished or {}
    row: dict[str, Any] = {"arm": arm, "seed": seed, "start": lines["mean"].iloc[0]}
    row |= {how: of["mean"].iloc[-1] for how, of in measured.items()}
    row["best"] = lines["mean"].max()
    if last["binary"] and last["how"] == "sampled":
        n = int(last["samples"])
        correct = np.rint(np.asarray(last["scores"]) * n)
        row |= {f"pass@{k}": float(pass_at_k(correct, n, k).mean()) for k in _powers(n)}
    curve = lines.drop_duplicates("num_tokens", keep="last")  # tokens stand still within a rollout batch
    shared = curve[curve["num_tokens"] < budget["num_tokens"]]
    at_end = np.interp(budget["num_tokens"], curve["num_tokens"], curve["mean"])
    row["auc"] = area_under_curve([*shared["num_tokens"], budget["num_tokens"]], [*shared["mean"], at_end])
    for name, column in (("tokens", "num_tokens"), ("seconds", "seconds")):
        if target is None:
            break
        reached = first_reaching(curve[column], curve["mean"], target)
        restricted, arrived = restrict([reached], float(budget[column]))
        row[f"{name}_to_target"] = float(restricted[0])
        if name == "tokens":
            row["reached"] = bool(arrived[0])
    best = lines.loc[lines["mean"].idxmax()]
    row["collapsed"] = bool(last["high"] < best["low"])
    row |= {"steps": end.get("steps"), "num_tokens": end.get("num_tokens"), "seconds": end.get("seconds")}
    return row | _training(run.metrics)


def _training(metrics: pd.DataFrame) -> dict[str, float]:
    """Figures of training: the last tenth of a metric's lines for the state, all of them for the means."""
    ends = {"entropy": "entropy", "length": "completions/mean_length"}
    means = {"clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean", "kl_old": "kl_old"}
    means |= {"grad_norm": "grad_norm"}
    # Not every line has each: of a rollout batch that is used twice, the second time has none of the rollout's.
    lines = {name: metrics[key].dropna() for name, key in ends.items() if key in metrics}
    values = {name: float(of.tail(max(1, len(of) // 10)).mean()) for name, of in lines.items()}
    values |= {name: float(metrics[key].mean()) for name, key in means.items() if key in metrics}
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
    """By their hash, or by the model's name where a run has none."""
    for ((arm, seed), run), ((other, of), theirs) in combinations(runs.items(), 2):
        both = run.manifest, theirs.manifest
        name = "weights_sha256" if all("weights_sha256" in manifest for manifest in both) else "model"
        a, b = (manifest.get(name) for manifest in both)
        if seed == of and a != b:  # a seed decides how adapters are initialised
            raise ValueError(
                f"{arm} and {other} began with different weights in seed {seed} ({name} {a} and {b}): compare "
                "runs of one model, in a fresh folder"
            )


def _check_problems(accuracy: pd.DataFrame) -> None:
    if accuracy["problems"].nunique() > 1:
        one, other, *_ = accuracy.drop_duplicates("problems").itertuples()
        raise ValueError(
            f"{one.arm}, seed {one.seed} was measured on {one.problems} held-out problems and {other.arm}, seed "
            f"{other.seed} on {other.problems}: compare runs with the same ones"
        )


def _constant(curves: pd.DataFrame) -> str:
    """That no answer of any measurement was right, or every one, and what to check; empty where neither is so."""
    binary = curves["binary"].all()
    if curves["mean"].max() <= 0:
        return (
            f"no answer was ever right, in any arm{'' if binary else ' (no score above 0)'}: nothing was learned, "
            "and arms cannot differ. Read some answers (hapo eval --output). Look first for right ones that score "
            "0: rewards, answer_column, prompt_template, chat; then for answers that are cut off: "
            "max_completion_length. Where none is right, take easier problems or a stronger model"
        )
    if binary and curves["mean"].min() >= 1:
        return (
            "every answer was right, in every arm, from the start: nothing was left to learn, and arms cannot "
            "differ. Check that rewards can tell a wrong answer; where they can, take harder problems"
        )
    return ""


def _warnings(runs: pd.DataFrame, curves: pd.DataFrame, reference: str, how: str, without: str) -> list[str]:
    """Reasons why arms cannot differ, and why there is no target."""
    if constant := _constant(curves):
        return [constant]
    found = [without] if without else []
    if how != "sampled":
        found.append(
            "accuracy here is that of greedy answers and says nothing of sampled ones, by which not every run was "
            "measured (verl: actor_rollout_ref.rollout.val_kwargs.temperature above 0)"
        )
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
                "of the tokens): methods that act by their bounds cannot show it; take more optimiser steps a "
                "rollout batch, or a larger learning rate"
            )
    if "kl_old" in runs:
        moved = by_arm["kl_old"].mean().dropna()
        for arm in moved[moved < NO_MOVE].index:
            found.append(
                f"{arm}: the policy never leaves the rollout policy, every ratio is 1; take more optimiser "
                "steps a rollout batch"
            )
    ends = by_arm[["start", how]].mean()
    if ((ends[how] - ends["start"]) < LITTLE).all():
        remedy = "train longer, or raise the learning rate"
        if ends["start"].min() > 1 - 2 * LITTLE:
            remedy = "nearly every answer is right from the start; take harder problems"
        elif curves["mean"].max() < LITTLE:
            remedy = (
                "next to no answer was ever right; take easier problems or a stronger model, and check rewards"
            )
        found.append(f"no arm learned anything (under one point): {remedy}")
    tokens = by_arm["num_tokens"].mean().dropna()
    if len(tokens) and tokens.max() > (1 + UNEQUAL) * tokens.min():
        found.append(
            f"the budgets are not equal: {tokens.idxmax()} generated {tokens.max():,.0f} tokens a run, "
            f"{tokens.idxmin()} {tokens.min():,.0f}; compare by the curve over tokens, or "
            "train with one token_budget"
        )
    return found
