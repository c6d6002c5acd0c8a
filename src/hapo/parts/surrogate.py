"""Surrogates: the per-token loss as a function of log-prob, ratio, advantage and bounds.

A surrogate with a stop-gradient, sg(...), has a gradient that is not the derivative of its value: read its
gradient, not its value. Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .bounds import Bounds


class Surrogate(NamedTuple):
    """Per-token loss, and where a bound took the place of the ratio."""

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
    negative = advantage < 0
    clipped_low = negative & (ratio < lower)
    clipped_high = (advantage > 0) & (ratio > upper)
    effective = torch.where(clipped_low | clipped_high, torch.where(negative, lower, upper), ratio)
    if dual_clip is not None:
        beyond = (advantage < 0) & (ratio > dual_clip)
        effective = torch.where(beyond, dual_clip, effective)
        clipped_high = clipped_high | beyond
    return Surrogate(-effective * advantage, clipped_low, clipped_high)


def unclipped_surrogate(ratio: Float[Tensor, "B T"], advantage: Float[Tensor, "B T"]) -> Surrogate:
    """-r A: the importance-weighted policy gradient; d/dlogp = -A r."""
    nowhere = torch.zeros_like(ratio, dtype=torch.bool)
    return Surrogate(-ratio * advantage, nowhere, nowhere)


def clipped_weight(
    logp: Float[Tensor, "B T"],
    ratio: Float[Tensor, "B T"],
    advantage: Float[Tensor, "B T"],
    bounds: Bounds,
    trust_region: Sequence[float] | None = None,
) -> Surrogate:
    """-sg(w) A logp with w = clip(r, 1 - low, 1 + high) (CISPO, arXiv 2506.13585).

    d/dlogp = -w A: a token outside the bounds keeps a bounded gradient. With `trust_region` (eps_low, eps_high)
    the weight is 0 where PPO would clip: A > 0 and r > 1 + eps_high, or A < 0 and r < 1 - eps_low.
    """
    r = ratio.detach()
    lower, upper = 1.0 - bounds.low, 1.0 + bounds.high
    weight = r.clamp(min=lower, max=upper)
    if trust_region is not None:
        outside = (advantage > 0) & (r > 1 + trust_region[1]) | (advantage < 0) & (r < 1 - trust_region[0])
        weight = torch.where(outside, 0.0, weight)
    return Surrogate(-weight * advantage * logp, r < lower, r > upper)


def gradient_preserving(
    logp: Float[Tensor, "B T"],
    ratio: Float[Tensor, "B T"],
    advantage: Float[Tensor, "B T"],
    bounds: Bounds,
    beta1: float,
    beta2: float,
    dual_clip: float | None = None,
) -> Surrogate:
    """-F A exp(logp - sg(logp)): what PPO would clip keeps a bounded gradient (CE-GPPO, arXiv 2509.20712, eq. 8).

    F = beta1 (1 - low) where r < 1 - low and A < 0; beta2 (1 + high) where r > 1 + high and A > 0; r elsewhere.
    Value and d/dlogp are both -F A. F is a constant for autograd. `dual_clip` as in `clipped_surrogate`.
    """
    r = ratio.detach()
    lower, upper = 1.0 - bounds.low, 1.0 + bounds.high
    low = (advantage < 0) & (r < lower)
    high = (advantage > 0) & (r > upper)
    weight = torch.where(low, beta1 * lower, torch.where(high, beta2 * upper, r))
    loss = -weight * advantage * (logp - logp.detach()).exp()
    return _dual_clipped(Surrogate(loss, low, high), r, advantage, dual_clip)


def asymmetric_ratio(
    logp: Float[Tensor, "B T"],
    ratio: Float[Tensor, "B T"],
    advantage: Float[Tensor, "B T"],
    bounds: Bounds,
    c_neg: float,
    c_pos: float,
    dual_clip: float | None = None,
) -> Surrogate:
    """The clip of PPO decides which tokens learn; where A >= 0 the weight is 1/r, not r (ASPO, arXiv 2510.06062).

    ===================================  ===================  =========
    where                                loss                 d/dlogp
    ===================================  ===================  =========
    A < 0, r < 1 - low                   -A (1 - low)         0
    A < 0, 1 - low <= r <= c_neg         -A r                 -A r
    A < 0, r > c_neg                     -A c_neg logp        -A c_neg
    A >= 0, r > 1 + high                 -A / (1 + high)      0
    A >= 0, 1/c_pos <= r <= 1 + high     -A r / sg(r)^2       -A / r
    A >= 0, r < 1/c_pos                  -A c_pos logp        -A c_pos
    ===================================  ===================  =========

    Values jump between the rows; gradients are what counts. `dual_clip` c caps the loss of negative advantages
    at -c A without a gradient where r > c, as in `clipped_surrogate`.
    """
    r = ratio.detach()
    lower, upper = 1.0 - bounds.low, 1.0 + bounds.high
    negative = advantage < 0
    low, high = negative & (r < lower), (advantage > 0) & (r > upper)
    capped = torch.where(negative, r > c_neg, r * c_pos < 1.0)
    cap = torch.full_like(ratio, c_pos).masked_fill(negative, c_neg).where(capped, 0.0)  # a cap may be inf
    flipped = torch.where(negative, ratio, ratio / r.square())
    loss = -advantage * torch.where(capped, cap * logp, flipped)
    loss = torch.where(low, -advantage * lower, torch.where(high, -advantage / upper, loss))
    return _dual_clipped(Surrogate(loss, low, high), r, advantage, dual_clip)


def soft_gate(
    ratio: Float[Tensor, "B T"], advantage: Float[Tensor, "B T"], tau_pos: float, tau_neg: float
) -> Surrogate:
    """-f(r) A with f(r) = (4 / tau) sigmoid(tau (r - 1)) (SAPO, arXiv 2511.20347).

    tau is `tau_pos` where A > 0, `tau_neg` elsewhere. d/dlogp = -A r 4 p (1 - p), p = sigmoid(tau (r - 1)): -A at
    r = 1 whatever tau is, and nearer to 0 the further r is from 1, without an edge. No token counts as clipped.
    """
    tau = torch.full_like(ratio, tau_neg).masked_fill(advantage > 0, tau_pos)
    gate = (tau * (ratio - 1.0)).sigmoid() * 4.0 / tau
    nowhere = torch.zeros_like(ratio, dtype=torch.bool)
    return Surrogate(-gate * advantage, nowhere, nowhere)


def _dual_clipped(surrogate: Surrogate, ratio: Tensor, advantage: Tensor, dual_clip: float | None) -> Surrogate:
    """The loss is the constant -c A where A < 0 and r > c; counted as clipped on the high side."""
    if dual_clip is None:
        return surrogate
    beyond = (advantage < 0) & (ratio > dual_clip)
    loss = torch.where(beyond, -dual_clip * advantage, surrogate.loss)
    return Surrogate(loss, surrogate.clipped_low, surrogate.clipped_high | beyond)
