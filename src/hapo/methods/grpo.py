"""GRPO: group-relative policy optimisation (arXiv 2402.03300)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from ..batch import TokenBatch
from ..method import Method
from ..parts.advantage import group_advantage
from ..parts.reduce import sequence_mean, sequence_sum, token_mean
from ._options import ClippedOptions, Paper, one_of, require
from ._registry import register


@register("grpo")
@dataclass(frozen=True, kw_only=True)
class GRPO(ClippedOptions):
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
        "bounds": "0.8 to 1.2",
        "surrogate": "clipped",
        "penalty": "k3",
        "reduce": "sequence mean of token means",
    }

    kl_coef: float = 0.04
    """beta of the paper."""
    scale: bool = True
    """Divide advantages by the group's standard deviation (paper; off in Dr. GRPO)."""
    reduction: Literal["sequence_mean", "token_mean", "sequence_sum"] = "sequence_mean"
    """Mean of per-response means (paper), one mean over all tokens (DAPO), or per-response sums over a constant
    (Dr. GRPO)."""
    length_limit: int = 3000
    """The constant of "sequence_sum": the limit of generation, in tokens (3000 in Dr. GRPO's main run)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        one_of("reduction", self.reduction, ("sequence_mean", "token_mean", "sequence_sum"))
        require(self.length_limit >= 1, "length_limit", self.length_limit, ">= 1")

    def build(self) -> Method:
        """The method with these options."""
        reduce = {
            "sequence_mean": sequence_mean,
            "token_mean": token_mean,
            "sequence_sum": partial(sequence_sum, constant=float(self.length_limit)),
        }
        return super().build().replace(reduce=reduce[self.reduction])

    def _advantage(self, batch: TokenBatch) -> Tensor:
        return group_advantage(batch.reward, batch.group, batch.mask, singleton=self.singleton, scale=self.scale)
