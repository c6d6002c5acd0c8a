"""RLOO: REINFORCE with a leave-one-out baseline (arXiv 2402.14740)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..batch import TokenBatch
from ..method import Method
from ..parts.advantage import leave_one_out_advantage
from ..parts.bounds import Bounds, constant_bounds, no_bounds
from ..parts.reduce import sequence_sum
from ..parts.surrogate import clipped_surrogate, unclipped_surrogate
from ._options import Options, Paper, pair, require
from ._registry import register


@register("rloo")
@dataclass(frozen=True, kw_only=True)
class RLOO(Options):
    """RLOO: a response's reward minus the mean reward of the others of its group; whole responses are the actions.

    L = -(1/S) sum_i sum_t r A_i, A_i = R_i - mean_{j != i} R_j; with r = 1 its gradient is REINFORCE's. A KL
    penalty goes into the reward before the baseline: R_i - beta sum_t (old_logp - ref_logp), beta = `kl_coef`.
    Constant for autograd: advantages.
    """

    paper: ClassVar = Paper(
        "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
        "2402.14740",
        2024,
    )
    summary: ClassVar = "leave-one-out baseline, no clipping, sums over a response"
    stages: ClassVar = {
        "advantage": "reward minus the others' mean",
        "surrogate": "unclipped",
        "reduce": "sequence mean of token sums",
    }

    kl_coef: float = 0.0
    """beta of the KL in the reward, not a loss term; 0.03 to 0.1 in the paper, with a reward model."""
    clip: Sequence[float] | None = None
    """(eps_low, eps_high) of a clipped surrogate; none in the paper (verl clips when RLOO meets its default
    loss)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if self.clip is not None:
            clip: Any = pair("clip", self.clip, "a pair (eps_low, eps_high), or None")
            require(0 < clip[0] < 1 and clip[1] > 0, "clip", self.clip, "0 < eps_low < 1 and eps_high > 0")
            object.__setattr__(self, "clip", clip)

    def build(self) -> Method:
        """The method with these options."""
        return (
            super()
            .build()
            .replace(
                kl_coef=0.0,
                bounds=self._bounds if self.clip else no_bounds,
                surrogate=clipped_surrogate if self.clip else unclipped_surrogate,
                reduce=sequence_sum,
            )
        )

    def _bounds(self, ratio: Tensor, signal: Tensor | None) -> Bounds:
        assert self.clip is not None
        return constant_bounds(ratio, *self.clip)

    def _advantage(self, batch: TokenBatch) -> Tensor:
        reward = batch.reward
        if self.kl_coef:
            if batch.ref_logp is None:
                raise ValueError(
                    f"kl_coef = {self.kl_coef} puts the KL to a reference policy into the reward and needs "
                    "TokenBatch.ref_logp at prepare(); set it, or kl_coef=0"
                )
            reward = reward - self.kl_coef * (batch.old_logp - batch.ref_logp).sum(-1)
        return leave_one_out_advantage(reward, batch.group, batch.mask, singleton=self.singleton)
