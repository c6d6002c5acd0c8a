"""Additive explanations of a set function: exact Shapley values, and the two regressions that resemble them.

Plain functions on the values of a game f: {0, 1}^n -> R with n players, in float64: `masks` (N, n) says who plays,
`values` (N,) what f is there. Scores are in the unit of f, and so are the results.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

Masks = NDArray[np.bool_]
Values = NDArray[np.float64]

MOST_PLAYERS = 20
"""Above it, all masks do not fit into memory."""


def all_masks(players: int) -> Masks:
    """(2^n, n): row k holds the bits of k, lowest first; so the first row is empty and the last one full.

    Raises:
        ValueError: n is below 0 or above MOST_PLAYERS.
    """
    if not 0 <= players <= MOST_PLAYERS:
        raise ValueError(f"all masks of {players} players: give 0 to {MOST_PLAYERS}, or take a sample of them")
    return (np.arange(2**players)[:, None] >> np.arange(players) & 1).astype(bool)


def shapley(values: Values) -> Values:
    """phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (f(S + i) - f(S)), (n,), of all 2^n values.

    Efficiency holds: sum_i phi_i = f(1) - f(0). Arrangement of the values as in `all_masks`.

    Raises:
        ValueError: the number of values is no power of 2.
    """
    values = np.asarray(values, float)
    players = max(len(values), 1).bit_length() - 1
    if values.ndim != 1 or len(values) != 2**players:
        raise ValueError(f"exact Shapley values need all 2^n values, got {values.shape}")
    numbers = np.arange(2**players)
    size = all_masks(players).sum(1)
    weight = np.array([1 / (players * math.comb(players - 1, s)) for s in range(players)] or [0.0])
    phi = np.zeros(players)
    for player in range(players):
        without = numbers[(numbers >> player & 1) == 0]
        gain = values[without + (1 << player)] - values[without]
        phi[player] = math.fsum(weight[size[without]] * gain)
    return phi


def kernel_masks(players: int, count: int, rng: np.random.Generator) -> tuple[Masks, Values]:
    """At most `count` masks for `kernel_shap`, (N, n), and their weights, (N,); not the empty and the full one.

    Each stands beside its complement. Sizes of which `count` allows all masks are taken whole, the smallest and
    largest first, with their exact weights; what is left is drawn of the other sizes, in proportion to their
    weight, and shares it equally. What is drawn twice counts twice, in one row. From count = 2^n - 2 on they are
    all masks.
    """
    inner = np.arange(1, players)
    mass = (players - 1) / (inner * (players - inner))  # of all masks of a size
    masks: list[Masks] = []
    weights: list[Values] = []
    low = 1
    while low <= players // 2:
        paired = 2 if 2 * low < players else 1
        every = math.comb(players, low)
        left = mass[low - 1 : players - low]
        if (count - sum(map(len, masks))) * paired * left[0] / left.sum() < paired * every * (1 - 1e-9):
            break
        these = np.zeros((every, players), bool)
        for row, chosen in zip(these, itertools.combinations(range(players), low), strict=True):
            row[list(chosen)] = True
        masks += [these, ~these][:paired]
        weights += [np.full(every, left[0] / every)] * paired
        low += 1
    pairs = (count - sum(map(len, masks))) // 2
    if low <= players // 2 and pairs:
        sizes = np.arange(low, players - low + 1)
        share = mass[low - 1 : players - low]
        drawn = rng.choice(sizes, size=pairs, p=share / share.sum())
        rest = rng.permuted(np.arange(players) < drawn[:, None], axis=1)
        both, times = np.unique(np.concatenate([rest, ~rest]), axis=0, return_counts=True)
        masks.append(both)
        weights.append(times * share.sum() / times.sum())
    empty = np.zeros((0, players), bool)
    return np.concatenate([empty, *masks]), np.concatenate([np.zeros(0), *weights])


def kernel_shap(masks: Masks, weights: Values, values: Values, full: float, empty: float) -> Values:
    """The weighted least squares form of Shapley values, (n,): exactly these where the masks are all masks.

    argmin_phi sum_z w_z (f(z) - f(0) - phi z)^2 with sum_i phi_i = f(1) - f(0), which is met by eliminating the
    last player; no penalty. For all masks w_z = (n - 1) / (C(n, |z|) |z| (n - |z|)).

    Args:
        masks: (N, n), none of them empty or full, where the weight is infinite.
        weights: w_z, (N,), from `kernel_masks`.
        values: (N,).
        full: f(1).
        empty: f(0).
    """
    players = masks.shape[1]
    if players < 2:
        return np.full(players, full - empty)
    z, root = masks.astype(float), np.sqrt(weights)
    last = z[:, -1]
    left = (z[:, :-1] - last[:, None]) * root[:, None]
    right = (values - empty - last * (full - empty)) * root
    phi = np.linalg.lstsq(left, right, rcond=None)[0]
    return np.append(phi, full - empty - math.fsum(phi))


def lime_masks(players: int, count: int, rng: np.random.Generator) -> Masks:
    """`count` masks for `lime`, (N, n), as its library draws them for text: the full one, then masks that lack
    1 to n players, each number as likely, any of them."""
    lacking = rng.integers(1, players + 1, size=count - 1)
    drawn = rng.permuted(np.arange(players) >= lacking[:, None], axis=1)
    return np.concatenate([np.ones((1, players), bool), drawn])


def lime(masks: Masks, values: Values, width: float = 0.25, ridge: float = 0.0) -> tuple[float, Values]:
    """Intercept and coefficients, (n,), of the local linear model of LIME for text.

    argmin sum_z pi(z) (f(z) - phi_0 - phi z)^2 + ridge |phi|^2, the intercept free, with
    pi = sqrt(exp(-d^2 / width^2)) and d = 1 - sqrt(|z| / n), the cosine distance to the full mask (1 for the empty
    one). The library of the LIME paper measures d in hundredths and has the width 25, which is the same. The
    result is linear in f, whatever its scale; it does not sum to f(1) - f(0). Without a ridge, of several
    solutions the shortest.

    Raises:
        ValueError: a width that is not positive, or a ridge below 0.
    """
    if not width > 0 or not ridge >= 0:
        raise ValueError(f"LIME needs a width above 0 and a ridge of at least 0, got {width} and {ridge}")
    players = masks.shape[1]
    if players == 0:
        return float(np.mean(values)), np.zeros(0)
    distance = 1 - np.sqrt(masks.sum(1) / players)
    pi = np.sqrt(np.exp(-((distance / width) ** 2)))
    z = masks.astype(float)
    mean_z, mean_f = np.average(z, axis=0, weights=pi), np.average(values, weights=pi)
    root = np.sqrt(pi)
    left = np.vstack([(z - mean_z) * root[:, None], math.sqrt(ridge) * np.eye(players)])
    right = np.append((values - mean_f) * root, np.zeros(players))
    phi = np.linalg.lstsq(left, right, rcond=None)[0]
    return float(mean_f - mean_z @ phi), phi
