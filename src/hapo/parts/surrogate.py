"""Surrogates: the per-token loss as a function of ratio, advantage and bounds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .bounds import Bounds


class Surrogate(NamedTuple):
    """Per-token loss, and where it has no gradient because a bound holds it."""

    loss: Float[Tensor, "B T"]
    clipped_low: Bool[Tensor, "B T"]
    clipped_high: Bool[Tensor, "B T"]


def clipped_surrogate(
    ratio: Float[Tensor, "B T"],
    advantage: Float[Tensor, "B T"],
    bounds: Bounds,
    dual_clip: float | None = None,
) -> Surrogate:
    """-min(r A, clip(r, 1 - low, 1 + high) A), the clipped surrogate of PPO (arXiv 1707.06347, eq. 7).

    The gradient with respect to logp is -A r, and 0 where A > 0 and r > 1 + high, or A < 0 and r < 1 - low; a
    ratio exactly on a bound is unclipped. `dual_clip` c > 1 caps the loss of negative advantages at -c A (no
    gradient where r > c; arXiv 1912.09729, eq. 5), counted as clipped on the high side.
    """
    lower, upper = 1.0 - bounds.low, 1.0 + bounds.high
    clipped_low = (advantage < 0) & (ratio < lower)
    clipped_high = (advantage > 0) & (ratio > upper)
    effective = torch.where(clipped_low, lower, torch.where(clipped_high, upper, ratio))
    if dual_clip is not None:
        beyond = (advantage < 0) & (ratio > dual_clip)
        effective = torch.where(beyond, dual_clip, effective)
        clipped_high = clipped_high | beyond
    return Surrogate(-effective * advantage, clipped_low, clipped_high)
