"""Dr. GRPO: GRPO without the divisions by length and by standard deviation (arXiv 2503.20783)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from ..method import Method
from ..parts.advantage import Scale
from ..parts.bounds import constant_bounds
from ..parts.reduce import sequence_sum
from ..parts.surrogate import clipped_surrogate
from ..stage import Stage
from ._options import ClippedOptions, GroupOptions, Paper, require
from ._registry import register


@register("dr_grpo")
@dataclass(frozen=True, kw_only=True)
class DrGRPO(GroupOptions, ClippedOptions):
    """Dr. GRPO: A = R - mean, and per-response sums over a constant C instead of per-response means.

    L = (1/S) sum_i sum_t -min(r A, clip(r, 1 - eps, 1 + eps) A) / C, C = `length_limit`. The paper's objective
    has no C; its code divides by the limit of generation, which rescales the learning rate only. Constant for
    autograd: advantages.
    """

    paper: ClassVar = Paper("Understanding R1-Zero-Like Training: A Critical Perspective", "2503.20783", 2025)
    summary: ClassVar = "GRPO without the division by length and by standard deviation, no KL"

    scale_rewards: Scale = "none"
    """No deviation divides (paper)."""
    length_limit: int = 3000
    """C: the limit of generation, in tokens (3000 in the paper's main run)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(self.length_limit >= 1, "length_limit", self.length_limit, ">= 1")

    def build(self) -> Method:
        """The method with these options."""
        return Method(
            **self.shared(),
            advantage=self.group_advantage(),
            bounds=Stage(constant_bounds, "ratio", low=self.eps_low, high=self.eps_high),
            surrogate=Stage(clipped_surrogate, "ratio", "advantage", "bounds", dual_clip=self.dual_clip),
            penalty=self.kl(),
            reduce=partial(sequence_sum, constant=float(self.length_limit)),
        )
