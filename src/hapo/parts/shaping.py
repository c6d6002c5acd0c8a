"""Shaping: rewards before, and advantages after, the comparison within a group.

Everything here is a constant for autograd.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
    applies: Bool[Tensor, "B T"] = torch.where(signal > 0, ~inside, inside)
    return torch.where(applies, advantage * (1.0 + beta * signal), advantage)
