"""GRPO: group-relative policy optimisation (arXiv 2402.03300)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..method import Method
from ..parts.bounds import constant_bounds
from ..parts.reduce import sequence_mean
from ..parts.surrogate import clipped_surrogate
from ..stage import Stage
from ._options import ClippedOptions, GroupOptions, Paper
from ._registry import register


@register("grpo")
@dataclass(frozen=True, kw_only=True)
class GRPO(GroupOptions, ClippedOptions):
    """GRPO: the reward's z-score in its group, the clipped surrogate, a mean of means, and a KL penalty.

    L = (1/S) sum_i (1/n_i) sum_t [ -min(r A, clip(r, 1 - eps, 1 + eps) A) + beta D ], eq. 3, with the k3
    estimate D of eq. 4. Constant for autograd: advantages. No author training code exists. verl's default
    differs: token mean, dual clip 3, A = R in a group of one; TRL adds 1e-4 to the standard deviation and
    counts rows without tokens.
    """

    paper: ClassVar = Paper("DeepSeekMath: Pushing the Limits of Mathematical Reasoning", "2402.03300", 2024)
    summary: ClassVar = "group z-score, mean of per-response means, KL to a reference"

    kl_coef: float = 0.04
    """beta of the paper."""

    def build(self) -> Method:
        """The method with these options."""
        return Method(
            **self.shared(),
            advantage=self.group_advantage(),
            bounds=Stage(constant_bounds, "ratio", low=self.eps_low, high=self.eps_high),
            surrogate=Stage(clipped_surrogate, "ratio", "advantage", "bounds", dual_clip=self.dual_clip),
            penalty=self.kl(),
            reduce=sequence_mean,
        )
