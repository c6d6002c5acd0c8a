"""Explainers: from a game f on n players to a number per player, with a budget of masks.

`captum_shapley` is captum's, from the extra `shape`; the explainer of any other library is a function of this form
too. Each sees masks, never text, so that nothing is tokenised anew. `bench/attribution.py` measures them side by
side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from .shapley import Masks, Values, all_masks, kernel_masks, kernel_shap, lime, lime_masks, shapley

Game = Callable[[Masks], Values]
"""f: masks (N, n), True where the player plays -> (N,)."""

Explainer = Callable[[Game, int, int, int], Values]
"""(f, players n, samples, seed) -> (n,). Equal arguments give equal masks in equal order, whenever f is asked."""


def shapley_values(f: Game, players: int, samples: int, seed: int) -> Values:
    """Shapley values: exact where 2^n <= samples, else the regression of Kernel SHAP on so many masks.

    Masks stand in pairs and the outer sizes are whole (`kernel_masks`); sum_i phi_i = f(1) - f(0) always.
    """
    if 2**players <= samples:
        return shapley(f(all_masks(players)))
    masks, weights = kernel_masks(players, samples - 2, np.random.default_rng(seed))
    values = f(np.concatenate([masks, *_ends(players)]))
    return kernel_shap(masks, weights, values[:-2], values[-2], values[-1])


def local_model(f: Game, players: int, samples: int, seed: int) -> Values:
    """LIME's coefficients: of all masks where 2^n <= samples, else of so many, drawn as for text."""
    every = 2**players <= samples
    masks = all_masks(players) if every else lime_masks(players, samples, np.random.default_rng(seed))
    return lime(masks, f(masks))[1]


def captum_shapley(f: Game, players: int, samples: int, seed: int) -> Values:
    """Shapley values by captum's ShapleyValueSampling: permutations, each followed by its reverse.

    A permutation takes n - 1 masks beside the ends, so samples are rounded to whole ones, and at least one.
    """
    import torch
    from captum.attr import ShapleyValueSampling

    def orders(features: int, count: int) -> Iterator[list[int]]:
        order: list[int] = []
        for number in range(count):
            order = order[::-1] if number % 2 else torch.randperm(features).tolist()
            yield order

    if not players:
        return np.zeros(0)
    explainer = ShapleyValueSampling(lambda masks: torch.tensor(f(masks.bool().numpy())))
    explainer.permutation_generator = orders
    ones, zeros = torch.ones(1, players), torch.zeros(1, players)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        count = max(1, (samples - 2) // max(players - 1, 1))
        found = explainer.attribute(ones, zeros, n_samples=count, perturbations_per_eval=players)
    return found[0].double().numpy()


def _ends(players: int) -> tuple[Masks, Masks]:
    """The full mask, the empty one."""
    return np.ones((1, players), bool), np.zeros((1, players), bool)
