"""GRPO: group-relative policy optimisation (arXiv 2402.03300)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from ..batch import TokenBatch
from ..method import Method
from ..parts.advantage import group_advantage
from ..parts.bounds import Bounds, constant_bounds
from ..parts.reduce import sequence_mean
from ..parts.surrogate import clipped_surrogate
from ._registry import Options, Paper, register, require


@register("grpo")
@dataclass(frozen=True, kw_only=True)
class GRPO(Options):
    """GRPO: the reward's z-score in its group, the clipped surrogate, a mean of means, and a KL penalty.

    L = (1/S) sum_i (1/n_i) sum_t [ -min(r A, clip(r, 1 - eps, 1 + eps) A) + beta D ], eq. 3, with the k3
    estimate D of eq. 4. Constant for autograd: advantages. No author training code exists. verl's default
    differs: token mean, dual clip 3, A = R in a group of one; TRL adds 1e-4 to the standard deviation and
    counts rows without tokens.
    """

    paper: ClassVar = Paper("DeepSeekMath: Pushing the Limits of Mathematical Reasoning", "2402.03300", 2024)
    summary: ClassVar = "group z-score, mean of per-response means, KL to a reference"
    stages: ClassVar = {
        "advantage": "group z-score",
        "bounds": "1 ± eps",
        "surrogate": "clipped",
        "penalty": "k3",
        "reduce": "sequence mean of token means",
    }

    eps: float = 0.2
    """Clip range on both sides; not stated in the paper, default of verl and TRL."""
    kl_coef: float = 0.04
    """beta of the paper."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(0 < self.eps < 1, "eps", self.eps, "in (0, 1)")

    def build(self) -> Method:
        """The method with these options."""

        def advantage(batch: TokenBatch) -> Tensor:
            return group_advantage(batch.reward, batch.group, batch.mask, singleton=self.singleton)

        def bounds(ratio: Tensor, signal: Tensor | None) -> Bounds:
            return constant_bounds(ratio, self.eps, self.eps)

        return Method(
            name="grpo",
            advantage=advantage,
            sampler_cap=self.sampler_cap,
            bounds=bounds,
            surrogate=partial(clipped_surrogate, dual_clip=self.dual_clip),
            kl_coef=self.kl_coef,
            reduce=sequence_mean,
        )
