"""How often 95 % intervals of a mean paired difference cover, and how often a comparison names a false winner.

    python -m bench.compare_statistics --output bench/results/compare_statistics.json

Coverage and median width (of the finite ones, relative to the t interval's) of six schemes on 5,000 simulated sets
of differences, BCa on 2,000, and of `paired_difference` as shipped on 2,000. Then the share of 2,000 simulated
comparisons of five equal arms that show any difference after Holm's correction, by scheme, and by `compare_arms`.
About four minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from hapo.insight.statistics import MIN_SEEDS, compare_arms, paired_difference

from .paired import machine

Array = NDArray[np.float64]
Limits = tuple[Array, Array]
Draw = Callable[[np.random.Generator, tuple[int, int]], Array]

RESAMPLES = 1_599  # the ranks of 0.05, 0.05 / 4 and their halves are whole
SEEDS = (3, 4, 5, 8, 12, 20)


def on_grid(values: Array) -> Array:
    """Accuracies of 500 problems."""
    return np.round(500 * values) / 500


SHAPES: dict[str, tuple[Draw, float]] = {  # and the true mean
    "normal": (lambda rng, size: rng.normal(size=size), 0.0),
    "t, 4 degrees": (lambda rng, size: rng.standard_t(4, size), 0.0),
    "gamma, skewness 1": (lambda rng, size: rng.gamma(4, size=size), 4.0),
    "exponential, skewness 2": (lambda rng, size: rng.exponential(size=size), 1.0),
    "accuracy, sd 7.5 steps": (lambda rng, size: on_grid(rng.normal(0.02, 0.015, size)), 0.02),
    "accuracy, sd 0.5 steps": (lambda rng, size: on_grid(rng.normal(0, 0.001, size)), 0.0),
    "one in ten collapses": (lambda rng, size: rng.normal(0, 0.01, size) - 0.3 * (rng.random(size) < 0.1), -0.03),
}


def resampled(d: Array, bandwidth: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Means and standard errors (sets, resamples), the noise being `bandwidth` standard deviations wide."""
    n = d.shape[1]
    picks, noise = rng.integers(n, size=(RESAMPLES, n)), rng.normal(size=(RESAMPLES, n))
    counts, weights = (
        np.stack([((picks == i) * part).sum(1) for i in range(n)]) for part in (np.ones_like(noise), noise)
    )
    width = bandwidth * d.std(1, ddof=1, keepdims=True)
    means = (d @ counts + width * noise.sum(1)) / n
    squares = (d**2 @ counts + 2 * width * (d @ weights) + width**2 * (noise**2).sum(1)) / n
    return means, np.sqrt(np.maximum(squares - means**2, 0) / (n - 1))


def bootstrap_t(
    d: Array, rng: np.random.Generator, bandwidth: float = 0.0, symmetric: bool = False, alpha: float = 0.05
) -> Limits:
    error, mean = d.std(1, ddof=1) / d.shape[1] ** 0.5, d.mean(1)
    means, errors = resampled(d - mean[:, None], bandwidth, rng)
    means[np.abs(means) < 1e-12], errors[errors < 1e-9] = 0, 0
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num(means / errors, nan=0.0, posinf=np.inf, neginf=-np.inf)
        if symmetric:
            high = at(np.sort(np.abs(t), 1), 1 - alpha)
            low = -high
        else:
            t.sort(1)
            low, high = at(t, alpha / 2), at(t, 1 - alpha / 2)
        return mean - np.where(error > 0, error * high, 0), mean - np.where(error > 0, error * low, 0)


def at(ordered: Array, share: float) -> Array:
    return ordered[:, round(share * (RESAMPLES + 1)) - 1]


def percentile(d: Array, rng: np.random.Generator) -> Limits:
    means = np.sort(resampled(d, 0.0, rng)[0], 1)
    return at(means, 0.025), at(means, 0.975)


def bca(d: Array, rng: np.random.Generator) -> Limits:
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap((d[:400],), np.mean, axis=1, n_resamples=RESAMPLES, batch=50, rng=rng)
    return found.confidence_interval.low, found.confidence_interval.high


def student(d: Array, rng: np.random.Generator) -> Limits:
    half = stats.t.ppf(0.975, d.shape[1] - 1) * d.std(1, ddof=1) / d.shape[1] ** 0.5
    return d.mean(1) - half, d.mean(1) + half


def shipped(d: Array, rng: np.random.Generator) -> Limits:
    found = [paired_difference(row, 0 * row, resamples=RESAMPLES, seed=seed) for seed, row in enumerate(d[:400])]
    return np.array([one.low for one in found]), np.array([one.high for one in found])


SCHEMES: dict[str, Callable[[Array, np.random.Generator], Limits]] = {
    "percentile": percentile,
    "BCa": bca,
    "t interval": student,
    "bootstrap-t": bootstrap_t,
    "symmetric": lambda d, rng: bootstrap_t(d, rng, symmetric=True),
    "symmetric, smoothed": lambda d, rng: bootstrap_t(d, rng, 1 / d.shape[1], symmetric=True),
    "paired_difference": shipped,
}


def coverage(shape: str, n: int, simulations: int) -> dict[str, object]:
    draw, truth = SHAPES[shape]
    rng = np.random.default_rng([n, list(SHAPES).index(shape)])
    d = draw(rng, (simulations, n)) - truth
    schemes = {}
    for name, scheme in SCHEMES.items():
        if name == "paired_difference" and n < MIN_SEEDS:
            continue
        parts = [scheme(part, rng) for part in np.split(d, 5)]
        low, high = (np.concatenate(side) for side in zip(*parts, strict=True))
        usual = np.subtract(*student(d[: len(low)], rng)[::-1])
        finite = np.isfinite(high - low)
        schemes[name] = {
            "covers": round(100 * float(np.mean((low <= 1e-12) & (high >= -1e-12))), 2),
            "width": round(float(np.median((high - low)[finite]) / np.median(usual)), 3)
            if finite.mean() > 0.5
            else None,
            "no finite interval": round(100 * float(1 - finite.mean()), 2),
            "simulations": len(low),
        }
    return {"differences": shape, "seeds": n, "schemes": schemes}


def false_winners(shape: str, n: int, simulations: int) -> dict[str, object]:
    """Each arm's own noise has the shape; a seed's difficulty is common to its arms."""
    draw, _ = SHAPES[shape]
    rng = np.random.default_rng([n, 1])
    noise = np.stack([draw(rng, (simulations, n)) for _ in range(5)])
    scores = noise + noise.std() * rng.normal(size=(simulations, n))
    shown = {}
    for name, options in {
        "bootstrap-t": {},
        "symmetric, smoothed": {"bandwidth": 1 / n, "symmetric": True},
    }.items():
        # Holm rejects something exactly where Bonferroni does.
        limits = [bootstrap_t(arm - scores[0], rng, **options, alpha=0.05 / 4) for arm in scores[1:]]
        shown[name] = np.any([(low > 1e-12) | (high < -1e-12) for low, high in limits], axis=0)
    tables = (pd.DataFrame(one.T, columns=list("rabcd")) for one in scores.swapaxes(0, 1))
    found = (compare_arms(table, "r", seed=seed, resamples=RESAMPLES) for seed, table in enumerate(tables))
    shown["compare_arms"] = np.array([(table["p_holm"] <= 0.05).any() for table in found])
    winners = {name: round(100 * float(which.mean()), 2) for name, which in shown.items()}
    return {"arms": 5, "noise": shape, "seeds": n, "simulations": simulations, "false winners": winners}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=5_000)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    covers = []
    for shape in SHAPES:
        print(f"\n{shape:26}" + "".join(f"{name:>22}" for name in SCHEMES))
        for n in SEEDS:
            covers.append(coverage(shape, n, given.simulations))
            schemes = covers[-1]["schemes"]
            print(
                f"{n:26}" + "".join(f"{s['covers']:>13} % x{s['width']}".rjust(22) for s in schemes.values()),
                flush=True,
            )
    winners = [
        false_winners(shape, n, 2_000)
        for shape in ("normal", "t, 4 degrees", "exponential, skewness 2", "accuracy, sd 0.5 steps")
        for n in (8, 12)
    ]
    for one in winners:
        print(one)
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        packages = ("numpy", "scipy", "pandas", "statsmodels")
        report = {"machine": machine(packages=packages), "resamples": RESAMPLES, "coverage": covers}
        given.output.write_text(json.dumps(report | {"family-wise": winners}, indent=1) + "\n")


if __name__ == "__main__":
    main()
