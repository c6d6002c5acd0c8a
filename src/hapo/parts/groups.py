"""Sums over groups, the responses to one prompt. `rows` are those that count."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def group_index(group: Int[Tensor, " B"]) -> tuple[Int[Tensor, " B"], int]:
    """Prompt ids as 0..K-1, and K."""
    ids, index = torch.unique(group, return_inverse=True)
    return index, ids.numel()


def group_sum(x: Float[Tensor, "B ..."], index: Int[Tensor, " B"], k: int) -> Float[Tensor, "K ..."]:
    """Sums of x over the rows of each group."""
    return torch.zeros(k, *x.shape[1:], dtype=x.dtype, device=x.device).index_add(0, index, x)


def equal_rewards(
    reward: Float[Tensor, " B"], group: Int[Tensor, " B"], rows: Bool[Tensor, " B"]
) -> Bool[Tensor, " B"]:
    """True at the rows whose group's counted rewards are all equal (a group of one included)."""
    index, k = group_index(group)
    inf = torch.full((k,), torch.inf, dtype=reward.dtype, device=reward.device)
    low = inf.scatter_reduce(0, index, torch.where(rows, reward, torch.inf), "amin")
    high = (-inf).scatter_reduce(0, index, torch.where(rows, reward, -torch.inf), "amax")
    return (high <= low)[index]


def alone(group: Int[Tensor, " B"], rows: Bool[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """True at the rows whose group has one counted row."""
    index, k = group_index(group)
    return (group_sum(rows.double(), index, k) == 1)[index]
