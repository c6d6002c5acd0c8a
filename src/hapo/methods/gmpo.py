"""GMPO: geometric-mean policy optimisation (arXiv 2507.20673)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..method import Method
from ..parts.bounds import Bounds, constant_bounds
from ..parts.reduce import sequence_mean
from ..parts.surrogate import Surrogate
from ..stage import Stage
from ._options import GroupOptions, Paper, require
from ._registry import register


@register("gmpo")
@dataclass(frozen=True, kw_only=True)
class GMPO(GroupOptions):
    """GMPO: the geometric mean of a response's token ratios, each clipped first, is its weight.

    L = -(1/S) sum_i exp((1/n_i) sum_t c_it) A_i with the log-ratio d = logp - old_logp held to
    c = min(d, eps_high) where A > 0 and c = max(d, -eps_low) where A < 0. Constant for autograd: advantages.
    Clipping acts on single tokens, and in log space: the range of the ratio is exp(-eps_low) to exp(eps_high).

    Raises:
        ValueError: a bound is not positive and finite.
    """

    paper: ClassVar = Paper("Geometric-Mean Policy Optimization", "2507.20673", 2025)
    summary: ClassVar = "a response weighs by the geometric mean of its clipped token ratios"

    eps_low: float = 0.4
    """Lower clip range, of the log-ratio (paper)."""
    eps_high: float = 0.4
    """Upper clip range, of the log-ratio (paper)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("eps_low", "eps_high"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "> 0 and finite")

    def build(self) -> Method:
        """The method with these options."""
        low, high = -math.expm1(-self.eps_low), math.expm1(self.eps_high)
        return Method(
            **self.shared(),
            advantage=self.group_advantage(),
            bounds=Stage(constant_bounds, "ratio", low=low, high=high),
            surrogate=Stage(geometric_surrogate, "ratio", "advantage", "bounds", "mask"),
            penalty=self.kl(),
            reduce=sequence_mean,
        )


def geometric_surrogate(
    ratio: Float[Tensor, "B T"], advantage: Float[Tensor, "B T"], bounds: Bounds, mask: Bool[Tensor, "B T"]
) -> Surrogate:
    """-w_i A, w_i the geometric mean of the response's ratios after PPO's clip of each; the same w on every token.

    d w_i / d logp_it is w_i / n_i where token t is not clipped, else 0; a ratio exactly on a bound is not.
    """
    lower, upper = 1.0 - bounds.low, 1.0 + bounds.high
    low, high = (advantage < 0) & (ratio < lower), (advantage > 0) & (ratio > upper)
    clipped = torch.where(low, lower, torch.where(high, upper, ratio))
    mean = torch.where(mask, clipped.log(), 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp_min(1)
    return Surrogate(-mean.exp() * advantage, low, high)
