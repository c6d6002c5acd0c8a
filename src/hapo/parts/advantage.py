"""Advantages: what a response, or a token of it, earned relative to its group.

Shapes: B sequences, T tokens. Everything here is a constant for autograd.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

STD_EPS = 1e-6
"""Added to every standard deviation (verl's convention; TRL adds 1e-4, the papers nothing)."""


def _group_index(group: Int[Tensor, " B"]) -> tuple[Int[Tensor, " B"], int]:
    ids, index = torch.unique(group, return_inverse=True)
    return index, ids.numel()


def _group_sum(x: Float[Tensor, " B"], index: Int[Tensor, " B"], k: int) -> Float[Tensor, " K"]:
    return torch.zeros(k, dtype=x.dtype, device=x.device).index_add(0, index, x)


def equal_rewards(
    reward: Float[Tensor, " B"], group: Int[Tensor, " B"], rows: Bool[Tensor, " B"]
) -> Bool[Tensor, " B"]:
    """True at the rows whose group's counted rewards are all equal (a group of one included)."""
    index, k = _group_index(group)
    inf = torch.full((k,), torch.inf, dtype=reward.dtype, device=reward.device)
    low = inf.scatter_reduce(0, index, torch.where(rows, reward, torch.inf), "amin")
    high = (-inf).scatter_reduce(0, index, torch.where(rows, reward, -torch.inf), "amax")
    return (high <= low)[index]


def group_advantage(
    reward: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    singleton: Literal["zero", "reward"] = "zero",
    std_eps: float = STD_EPS,
) -> Float[Tensor, "B T"]:
    """A_i = (R_i - mean_k) / (std_k + 1e-6), on every valid token (GRPO, arXiv 2402.03300, section 4.1).

    std has the divisor n - 1. Rows without valid tokens are in no count. A group whose rewards are all equal
    has advantage 0 exactly; so has a group of one, unless `singleton="reward"` (verl's convention A = R).
    """
    rows = mask.any(-1)
    r = torch.where(rows, reward.double(), 0.0)
    index, k = _group_index(group)
    n = _group_sum(rows.double(), index, k)
    mean = _group_sum(r, index, k) / n.clamp_min(1)
    centred = torch.where(rows, r - mean[index], 0.0)
    std = (_group_sum(centred.square(), index, k) / (n - 1).clamp_min(1)).sqrt()
    advantage = centred / (std[index] + std_eps)
    advantage = torch.where(equal_rewards(r, group, rows), 0.0, advantage)
    if singleton == "reward":
        advantage = torch.where((n == 1)[index], r, advantage)
    return torch.where(mask, advantage.unsqueeze(1), 0.0).to(_dtype(reward))


def token_group_advantage(
    reward: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    singleton: Literal["zero", "reward"] = "zero",
    std_eps: float = STD_EPS,
    fallback_threshold: float | None = None,
) -> Float[Tensor, "B T"]:
    """A_it = (a_it - mu_k) / (s_k + 1e-6) with a_it = R_i on every valid token (HAPO, eq. 9).

    mu_k and s_k are taken over all valid tokens of group k (divisor N_k), so that the advantages of a group sum
    to 0 over its tokens. A group of equal rewards has advantage 0 exactly; a group of one as in
    `group_advantage`. With `fallback_threshold`, a group in which any |A| reaches it takes `group_advantage`
    instead (5 in the authors' release; not in the paper).
    """
    rows = mask.any(-1)
    length = mask.sum(-1).double()
    r = torch.where(rows, reward.double(), 0.0)
    index, k = _group_index(group)
    n = _group_sum(length, index, k).clamp_min(1)
    mean = _group_sum(length * r, index, k) / n
    centred = torch.where(rows, r - mean[index], 0.0)
    std = (_group_sum(length * centred.square(), index, k) / n).sqrt()
    advantage = centred / (std[index] + std_eps)
    advantage = torch.where(equal_rewards(r, group, rows), 0.0, advantage)
    by_group = group_advantage(reward, group, mask, singleton=singleton, std_eps=std_eps)
    if singleton == "reward":
        alone = (_group_sum(rows.double(), index, k) == 1)[index]
        advantage = torch.where(alone, r, advantage)
    out = torch.where(mask, advantage.unsqueeze(1), 0.0).to(_dtype(reward))
    if fallback_threshold is not None:
        extreme = (advantage.abs() >= fallback_threshold) & rows
        falls_back = _group_sum(extreme.double(), index, k)[index] > 0
        out = torch.where(falls_back.unsqueeze(1), by_group, out)
    return out


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
