"""Shaping: rewards before, and advantages after, the comparison within a group.

Everything here is a constant for autograd.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .entropy import mean_entropy
from .groups import columns, group_index, group_sum

SHARE_FLOOR = 1e-8
"""Floor of entropies and of their sums where they are divided by (ours; the paper says "a small constant")."""

RELATIVE_FLOOR = 1e-6
"""Floor of a group's mean entropy and of a response's entropy relative to it (ours; the paper has none)."""


def soft_overlong_punishment(
    length: Int[Tensor, " B"], max_length: int, buffer: int, factor: float = 1.0
) -> Float[Tensor, " B"]:
    """Length penalty that ramps down over the last `buffer` tokens (DAPO, arXiv 2503.14476, eq. 13).

    0 up to max_length - buffer tokens, then -(n - (max_length - buffer)) / buffer, never below -1; times
    `factor`. It is added to the verdict.

    Raises:
        ValueError: buffer is not in 1..max_length.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"the overlong buffer must be between 1 and max_length = {max_length}, got {buffer}")
    over = (length - (max_length - buffer)).float() / buffer
    return -factor * over.clamp(0.0, 1.0)


def redistribute(
    advantage: Float[Tensor, "B T"],
    ratio: Float[Tensor, "B T"],
    signal: Float[Tensor, "B T"],
    low: Float[Tensor, "B T"] | float,
    high: Float[Tensor, "B T"] | float,
    beta: float = 1.0,
    closed: bool = True,
) -> Float[Tensor, "B T"]:
    """Differential advantage redistribution (HAPO, eqs. 10-11): A (1 + beta h) where C holds, A elsewhere.

    C: the ratio is outside the neutral zone [1 - low / 2, 1 + high / 2] where h > 0, and inside it where
    h <= 0. `closed` says whether a ratio exactly on the border is inside. The ratio is a constant here.
    """
    r = ratio.detach()
    lower, upper = 1.0 - low / 2, 1.0 + high / 2
    inside = (r >= lower) & (r <= upper) if closed else (r > lower) & (r < upper)
    applies: Bool[Tensor, "B T"] = inside ^ (signal > 0)
    return torch.where(applies, advantage * (1.0 + beta * signal), advantage)


def entropy_shaped_reward(
    entropy: Float[Tensor, "B T"],
    correct: Bool[Tensor, "B *t"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    base: float = 1.0,
    bonus: float = 0.1,
) -> Float[Tensor, "B T"]:
    """Reward per token, by its share of the entropy at its position (GTPO, arXiv 2508.04349).

    Right responses: base + bonus d_t H_it / sum_k H_kt over the d_t right responses of the group that are alive
    at t. Wrong ones: -base - bonus h_t u_jt / sum_k u_kt with u = 1 / H. Entropies and sums are floored at
    1e-8 where they are divided by. 0 at masked positions, float64. T = 1, with mean entropies, makes it GRPO-S.
    With `correct` (B,T) tokens are right or wrong, each among those of its own kind at its position.
    """
    index, k = group_index(group)
    h, right = entropy.detach().double(), columns(correct)
    signed = torch.zeros_like(h)
    for own, share, sign in ((mask & right, h, 1.0), (mask & ~right, 1.0 / h.clamp_min(SHARE_FLOOR), -1.0)):
        share = torch.where(own, share, 0.0)
        alive = group_sum(own.double(), index, k)[index]
        total = group_sum(share, index, k)[index].clamp_min(SHARE_FLOOR)
        signed = torch.where(own, sign * (base + bonus * alive * share / total), signed)
    return signed


def entropy_bonus(
    advantage: Float[Tensor, "B T"], entropy: Float[Tensor, "B T"], alpha: float, kappa: float
) -> Float[Tensor, "B T"]:
    """A + min(alpha H, |A| / kappa): a bonus that never flips the sign (Entropy-Adv, arXiv 2506.14758).

    H in nats, floored at 0.
    """
    return advantage + torch.minimum(alpha * entropy.detach().clamp_min(0.0), advantage.abs() / kappa)


def relative_entropy(
    entropy: Float[Tensor, "B T"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    variant: Literal["paper", "release"] = "paper",
) -> Float[Tensor, "B 1"]:
    """Mean entropy of a response over the mean of these in its group (EDGE-GRPO, arXiv 2507.21848), float64.

    Its mean over a group is 1. The result is floored at 1e-6, and 1 where the group's mean is below that.
    `variant="release"`
    computes what the authors' code does: means over the padded width, and one mean over the whole batch.
    """
    mean = mean_entropy(entropy, mask)
    rows = mask.any(-1)
    if variant == "release":
        mean = mean * mask.sum(-1)  # the padded width, the same for all rows, cancels
        reference = mean.sum() / rows.sum().clamp_min(1)
    else:
        index, k = group_index(group)
        n = group_sum(rows.double(), index, k).clamp_min(1)
        reference = (group_sum(mean, index, k) / n)[index]
    relative = (mean / reference.clamp_min(RELATIVE_FLOOR)).clamp_min(RELATIVE_FLOOR)
    return torch.where(reference > RELATIVE_FLOOR, relative, 1.0).unsqueeze(1)
