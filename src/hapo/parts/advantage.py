"""Advantages: what a response, or a token of it, earned relative to its group.

Shapes: B sequences, T tokens. Everything here is a constant for autograd, computed in float64. A row's reward
counts in its group whether or not the row has valid tokens, as in TRL and verl: a response that is masked for its
length is still a failure of its group. A row whose reward is NaN could not be scored, is in no count and has
advantage 0. `singleton` says what a group of one gets: 0, or its reward, over 1 + 1e-6 where a deviation divides
(verl's convention).

Where `reward` is (B,) it is the response's. It may be (B,T) too, a number for each position, such as the returns
of `parts.credit`: each column is then compared by itself, as if it were the rewards, and the advantage at a
position is of its column. A NaN is in no count of its column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..batch import count_valid, masked, working_dtype
from .groups import alone, columns, equal_rewards, group_index, group_sum

STD_EPS = 1e-6
"""Added to every standard deviation (verl's convention; TRL adds 1e-4, the papers nothing)."""

LEAST_STD = 1e-5
"""A set of shaped rewards that spreads less than this is constant up to rounding (our guard)."""

Singleton = Literal["zero", "reward"]
Scale = Literal["group", "batch", "none"]


def group_advantage(
    reward: Float[Tensor, "B *t"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    singleton: Singleton = "zero",
    std_eps: float = STD_EPS,
    scale: Scale = "group",
) -> Float[Tensor, "B T"]:
    """A_i = (R_i - mean_k) / (std_k + 1e-6), on every valid token (GRPO, arXiv 2402.03300, section 4.1).

    std has the divisor n - 1; `scale="none"` leaves it out (Dr. GRPO, arXiv 2503.20783), `"batch"` takes that of
    all rewards of the rollout batch about their own mean (REINFORCE++; PPO lite, arXiv 2508.08221; TRL's
    `scale_rewards`). A group whose rewards are all equal has advantage 0 exactly.
    """
    centred, _ = _centred(reward, group)
    if scale == "none":
        return _on_tokens(centred, reward, group, mask, singleton, 1.0)
    std = _normalised(reward, torch.zeros_like(group) if scale == "batch" else group)[1]
    return _on_tokens(centred / (std + std_eps), reward, group, mask, singleton, 1.0 + std_eps)


def decoupled_advantage(
    rewards: Float[Tensor, "B K"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    weights: Sequence[float] | None = None,
    std_eps: float = STD_EPS,
) -> Float[Tensor, "B T"]:
    """Each reward is normalised in its group, then they are added up (GDPO, arXiv 2601.05242).

    a_ij = (R_ij - mean_k) / (std_k + 1e-6) for each reward j, x_i = sum_j w_j a_ij, and A_i = (x_i - mean) /
    (std + 1e-6) over the rollout batch, on every valid token. std has the divisor n - 1. A reward that is NaN adds
    nothing and is in no count, nor is a row of which all are; its advantage is 0. A group of one has a_ij = 0.

    Raises:
        ValueError: the number of weights is not that of the rewards.
    """
    r = rewards.double()
    if weights is None:
        weights = [1.0] * r.shape[1]
    if len(weights) != r.shape[1]:
        raise ValueError(f"reward_weights has {len(weights)} numbers for {r.shape[1]} rewards; give one for each")
    total = torch.zeros_like(r[:, 0])
    for weight, column in zip(weights, r.unbind(1), strict=True):
        centred, std = _normalised(column, group)
        total = total + weight * (centred / (std + std_eps)).nan_to_num(nan=0.0)
    total = total.masked_fill(r.isnan().all(1), torch.nan)
    centred, std = _normalised(total, torch.zeros_like(group))
    advantage = (centred / (std + std_eps)).nan_to_num(nan=0.0)
    return masked(advantage.to(working_dtype(rewards)).unsqueeze(1), mask)


def leave_one_out_advantage(
    reward: Float[Tensor, "B *t"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    singleton: Singleton = "zero",
    scale: Literal["group", "none"] = "none",
    std_eps: float = STD_EPS,
) -> Float[Tensor, "B T"]:
    """A_i = R_i - mean of the other responses' rewards, on every valid token (RLOO, arXiv 2402.14740).

    It is n / (n - 1) times the reward's distance from the group's mean. `scale="group"` divides by std_k +
    std_eps, the deviation of the group's rewards with the divisor n - 1.
    """
    centred, n = _centred(reward, group)
    advantage, divisor = centred * n / (n - 1).clamp_min(1), 1.0
    if scale == "group":
        advantage, divisor = advantage / (_normalised(reward, group)[1] + std_eps), 1.0 + std_eps
    return _on_tokens(advantage, reward, group, mask, singleton, divisor)


def token_group_advantage(
    reward: Float[Tensor, "B *t"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    singleton: Singleton = "zero",
    std_eps: float = STD_EPS,
    fallback_threshold: float | None = None,
) -> Float[Tensor, "B T"]:
    """A_it = (a_it - mu_k) / (s_k + 1e-6) with a_it = R_i on every valid token (HAPO, eq. 9).

    mu_k and s_k are taken over all valid tokens of group k (divisor N_k), so that the advantages of a group sum
    to 0 over its tokens; a row without tokens adds nothing to either. Equal rewards give advantage 0 exactly.
    With `fallback_threshold`, a group in which any |A| reaches it takes `group_advantage` instead (5 in the
    authors' release; not in the paper).
    """
    tokens = count_valid(mask)
    length = torch.where(reward.isnan(), 0, tokens if reward.ndim == 1 else columns(tokens)).double()
    rows = length > 0
    r = torch.where(rows, reward.double(), 0.0)
    index, k = group_index(group)
    n = group_sum(length, index, k).clamp_min(1)
    mean = group_sum(length * r, index, k) / n
    centred = torch.where(rows, r - mean[index], 0.0)
    std = (group_sum(length * centred.square(), index, k) / n).sqrt()
    advantage = centred / (std[index] + std_eps)
    advantage = torch.where(equal_rewards(r, group, rows), 0.0, advantage)
    out = _on_tokens(advantage, reward, group, mask, singleton, 1.0 + std_eps)
    if fallback_threshold is not None:
        by_group = group_advantage(reward, group, mask, singleton=singleton, std_eps=std_eps)
        extreme = group_sum((advantage.abs() >= fallback_threshold).double(), index, k)
        out = torch.where(columns((extreme > 0)[index]), by_group, out)
    return out


def signed_advantage(
    shaped: Float[Tensor, "B T"],
    correct: Bool[Tensor, "B *t"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    normalisation: Literal["padded", "own", "joint"] = "padded",
    *,
    std_eps: float = STD_EPS,
) -> Float[Tensor, "B T"]:
    """A = (r - mean R) / (std R + 1e-6), apart for right and wrong responses (GTPO, arXiv 2508.04349), or tokens.

    R, per group, for the tokens of right responses: their shaped rewards, with 0 in the place of every token of
    a wrong response ("padded"), or without these ("own"); likewise for wrong ones. "joint": one R for both,
    the shaped rewards as they are. std has the divisor n - 1; where R spreads by less than 1e-5, or has one
    element, A is 0. Float64. T = 1 makes it an advantage per response (GRPO-S).
    """
    index, k = group_index(group)
    out = torch.zeros_like(shaped, dtype=torch.float64)
    signs = [torch.ones_like(correct)] if normalisation == "joint" else [correct, ~correct]
    for sign in signs:
        own = mask & columns(sign)
        values = torch.where(own, shaped.double(), 0.0)
        members = own if normalisation == "own" else mask
        n = group_sum(members.sum(-1).double(), index, k)[index].unsqueeze(1)
        mean = group_sum(values.sum(-1), index, k)[index].unsqueeze(1) / n.clamp_min(1)
        square = torch.where(members, (values - mean).square(), 0.0).sum(-1)
        std = (group_sum(square, index, k)[index].unsqueeze(1) / (n - 1).clamp_min(1)).sqrt()
        advantage = (values - mean) / (std + std_eps)
        out = torch.where(own & (std >= LEAST_STD), advantage, out)
    return out


def _normalised(reward: Float[Tensor, "B *t"], group: Int[Tensor, " B"]) -> tuple[Tensor, Tensor]:
    """Distance from the group's mean, NaN where the reward is, and the group's deviation (divisor n - 1)."""
    counted = ~reward.isnan()
    centred, n = _centred(reward, group)
    index, k = group_index(group)
    std = (group_sum(centred.square(), index, k)[index] / (n - 1).clamp_min(1)).sqrt()
    return centred.masked_fill(~counted, torch.nan), std


def _centred(reward: Float[Tensor, "B *t"], group: Int[Tensor, " B"]) -> tuple[Tensor, Tensor]:
    """Distance of each row's reward from the group's mean, and the group's size; 0 where there is no reward."""
    counted = ~reward.isnan()
    r = torch.where(counted, reward.double(), 0.0)
    index, k = group_index(group)
    n = group_sum(counted.double(), index, k)
    mean = group_sum(r, index, k) / n.clamp_min(1)
    return torch.where(counted, r - mean[index], 0.0), n[index]


def _on_tokens(
    advantage: Tensor,
    reward: Tensor,
    group: Tensor,
    mask: Tensor,
    singleton: Singleton,
    divisor: float,
) -> Float[Tensor, "B T"]:
    """The rows' advantages on their valid tokens: exactly 0 where a group's rewards are equal."""
    counted = ~reward.isnan()
    advantage = torch.where(equal_rewards(reward.double(), group, counted) | ~counted, 0.0, advantage)
    if singleton == "reward":
        advantage = torch.where(alone(group, counted) & counted, reward.double() / divisor, advantage)
    return masked(columns(advantage.to(working_dtype(reward))), mask)
