"""Advantages: what a response, or a token of it, earned relative to its group.

Shapes: B sequences, T tokens. Everything here is a constant for autograd, computed in float64. Rows without
valid tokens are in no count. `singleton` says what a group of one gets: 0, or its reward (verl's convention).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..batch import lengths, masked, some, working_dtype
from .groups import alone, equal_rewards, group_index, group_sum

STD_EPS = 1e-6
"""Added to every standard deviation (verl's convention; TRL adds 1e-4, the papers nothing)."""

LEAST_STD = 1e-5
"""A set of shaped rewards that spreads less than this is constant up to rounding (our guard)."""

Singleton = Literal["zero", "reward"]


def group_advantage(
    reward: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    singleton: Singleton = "zero",
    std_eps: float = STD_EPS,
    scale: bool = True,
) -> Float[Tensor, "B T"]:
    """A_i = (R_i - mean_k) / (std_k + 1e-6), on every valid token (GRPO, arXiv 2402.03300, section 4.1).

    std has the divisor n - 1; `scale=False` leaves it out (Dr. GRPO, arXiv 2503.20783). A group whose rewards
    are all equal has advantage 0 exactly.
    """
    r, centred, n = _centred(reward, group, mask)
    advantage = centred
    if scale:
        index, k = group_index(group)
        std = (group_sum(centred.square(), index, k)[index] / (n - 1).clamp_min(1)).sqrt()
        advantage = centred / (std + std_eps)
    return _on_tokens(advantage, r, reward, group, mask, singleton)


def leave_one_out_advantage(
    reward: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    singleton: Singleton = "zero",
) -> Float[Tensor, "B T"]:
    """A_i = R_i - mean of the other responses' rewards, on every valid token (RLOO, arXiv 2402.14740).

    It is n / (n - 1) times the reward's distance from the group's mean.
    """
    r, centred, n = _centred(reward, group, mask)
    return _on_tokens(centred * n / (n - 1).clamp_min(1), r, reward, group, mask, singleton)


def token_group_advantage(
    reward: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    singleton: Singleton = "zero",
    std_eps: float = STD_EPS,
    fallback_threshold: float | None = None,
) -> Float[Tensor, "B T"]:
    """A_it = (a_it - mu_k) / (s_k + 1e-6) with a_it = R_i on every valid token (HAPO, eq. 9).

    mu_k and s_k are taken over all valid tokens of group k (divisor N_k), so that the advantages of a group sum
    to 0 over its tokens. A group of equal rewards has advantage 0 exactly. With `fallback_threshold`, a group
    in which any |A| reaches it takes `group_advantage` instead (5 in the authors' release; not in the paper).
    """
    length = lengths(mask).double()
    rows = length > 0
    r = torch.where(rows, reward.double(), 0.0)
    index, k = group_index(group)
    n = group_sum(length, index, k).clamp_min(1)
    mean = group_sum(length * r, index, k) / n
    centred = torch.where(rows, r - mean[index], 0.0)
    std = (group_sum(length * centred.square(), index, k) / n).sqrt()
    advantage = centred / (std[index] + std_eps)
    out = _on_tokens(advantage, r, reward, group, mask, singleton)
    if fallback_threshold is not None:
        by_group = group_advantage(reward, group, mask, singleton=singleton, std_eps=std_eps)
        extreme = group_sum((advantage.abs() >= fallback_threshold).double(), index, k)
        out = torch.where((extreme > 0)[index].unsqueeze(1), by_group, out)
    return out


def signed_advantage(
    shaped: Float[Tensor, "B T"],
    correct: Bool[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    normalisation: Literal["padded", "own", "joint"] = "padded",
    *,
    std_eps: float = STD_EPS,
) -> Float[Tensor, "B T"]:
    """A = (r - mean R) / (std R + 1e-6), apart for right and wrong responses (GTPO, arXiv 2508.04349).

    R, per group, for the tokens of right responses: their shaped rewards, with 0 in the place of every token of
    a wrong response ("padded"), or without these ("own"); likewise for wrong ones. "joint": one R for both,
    the shaped rewards as they are. std has the divisor n - 1; where R spreads by less than 1e-5, or has one
    element, A is 0. Float64. T = 1 makes it an advantage per response (GRPO-S).
    """
    index, k = group_index(group)
    out = torch.zeros_like(shaped, dtype=torch.float64)
    signs = [torch.ones_like(correct)] if normalisation == "joint" else [correct, ~correct]
    for sign in signs:
        own = mask & sign.unsqueeze(1)
        values = torch.where(own, shaped.double(), 0.0)
        members = own if normalisation == "own" else mask
        n = group_sum(members.sum(-1).double(), index, k)[index].unsqueeze(1)
        mean = group_sum(values.sum(-1), index, k)[index].unsqueeze(1) / n.clamp_min(1)
        square = torch.where(members, (values - mean).square(), 0.0).sum(-1)
        std = (group_sum(square, index, k)[index].unsqueeze(1) / (n - 1).clamp_min(1)).sqrt()
        advantage = (values - mean) / (std + std_eps)
        out = torch.where(own & (std >= LEAST_STD), advantage, out)
    return out


def _centred(
    reward: Float[Tensor, " B"], group: Int[Tensor, " B"], mask: Bool[Tensor, "B T"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Reward, its distance from the group's mean, and the group's size, of each row."""
    rows = some(mask)
    r = torch.where(rows, reward.double(), 0.0)
    index, k = group_index(group)
    n = group_sum(rows.double(), index, k)
    mean = group_sum(r, index, k) / n.clamp_min(1)
    return r, torch.where(rows, r - mean[index], 0.0), n[index]


def _on_tokens(
    advantage: Tensor, r: Tensor, reward: Tensor, group: Tensor, mask: Tensor, singleton: Singleton
) -> Float[Tensor, "B T"]:
    """The rows' advantages on their valid tokens: exactly 0 where a group's rewards are equal."""
    rows = some(mask)
    advantage = torch.where(equal_rewards(r, group, rows), 0.0, advantage)
    if singleton == "reward":
        advantage = torch.where(alone(group, rows), r, advantage)
    return masked(advantage.to(working_dtype(reward)).unsqueeze(1), mask)
