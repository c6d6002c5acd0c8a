"""Clip bounds: how far a ratio may leave 1 before its token stops learning."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Bounds(NamedTuple):
    """Per-token clip range [1 - low, 1 + high]; constants for autograd."""

    low: Float[Tensor, "B T"]
    high: Float[Tensor, "B T"]


def constant_bounds(like: Float[Tensor, "B T"], low: float, high: float) -> Bounds:
    """The same range for every token (DAPO's clip-higher where high > low)."""
    return Bounds(torch.full_like(like, low), torch.full_like(like, high))


def no_bounds(ratio: Float[Tensor, "B T"]) -> Bounds:
    """[0, inf) for every token."""
    return constant_bounds(ratio, 1.0, torch.inf)


def asymmetric_bounds(signal: Float[Tensor, "B T"], low: float, high: float, alpha: float = 1.0) -> Bounds:
    """Asymmetric adaptive clipping (HAPO, eqs. 12-13).

    low (1 - alpha h) where h <= 0, high (1 + alpha h) where h > 0, the base value elsewhere: certain tokens may
    fall further, uncertain tokens may rise further.
    """
    s = signal.detach()
    return Bounds(low - low * alpha * s.clamp(max=0), high + high * alpha * s.clamp(min=0))


def gated_bounds(gate: Float[Tensor, "B T"], inside: float, outside: float) -> Bounds:
    """Symmetric range `inside` where the gate is positive, `outside` elsewhere (Archer, arXiv 2507.15778)."""
    width = torch.full_like(gate, outside).masked_fill(gate > 0, inside)
    return Bounds(width, width)
