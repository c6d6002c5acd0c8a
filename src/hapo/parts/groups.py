"""Sums over groups, the responses to one prompt. `rows` are those that count."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def group_index(group: Int[Tensor, " B"]) -> tuple[Int[Tensor, " B"], int]:
    """Prompt ids as 0..K-1, and K."""
    ids, index = torch.unique(group, return_inverse=True)
    return index, ids.numel()


def columns(x: Shaped[Tensor, "B *t"]) -> Shaped[Tensor, "B #T"]:
    """A number per row as one column, for all positions; a number per position as it is."""
    return x.unsqueeze(1) if x.ndim == 1 else x


def group_sum(x: Float[Tensor, "B ..."], index: Int[Tensor, " B"], k: int) -> Float[Tensor, "K ..."]:
    """Sums of x over the rows of each group."""
    return torch.zeros(k, *x.shape[1:], dtype=x.dtype, device=x.device).index_add(0, index, x)


def equal_rewards(
    reward: Float[Tensor, "B *t"], group: Int[Tensor, " B"], rows: Bool[Tensor, "B *t"]
) -> Bool[Tensor, "B *t"]:
    """True at the rows whose group's counted rewards are all equal (a group of one included), in each column."""
    index, k = group_index(group)
    inf = torch.full((k, *reward.shape[1:]), torch.inf, dtype=reward.dtype, device=reward.device)
    at = index.view(-1, *[1] * (reward.ndim - 1)).expand_as(reward)
    low = inf.scatter_reduce(0, at, torch.where(rows, reward, torch.inf), "amin")
    high = (-inf).scatter_reduce(0, at, torch.where(rows, reward, -torch.inf), "amax")
    return (high <= low)[index]


def alone(group: Int[Tensor, " B"], rows: Bool[Tensor, "B *t"]) -> Bool[Tensor, "B *t"]:
    """True at the rows whose group has one counted row, in each column."""
    index, k = group_index(group)
    return (group_sum(rows.double(), index, k) == 1)[index]
