"""DAPO: decoupled clip and dynamic sampling policy optimisation (arXiv 2503.14476)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from ..batch import TokenBatch
from ..method import Method
from ..parts.advantage import group_advantage
from ..parts.bounds import Bounds, constant_bounds
from ..parts.reduce import token_mean
from ..parts.surrogate import clipped_surrogate
from ._registry import Options, Paper, register, require


@register("dapo")
@dataclass(frozen=True, kw_only=True)
class DAPO(Options):
    """DAPO: GRPO with a wider upper bound, one mean over all tokens, only mixed groups, and no KL.

    L = (1/N) sum_it -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), eq. 8. Constant for autograd: advantages.
    Drawing fresh prompts for the dropped groups, and the length penalty (`parts.shaping`), are the trainer's
    work. The verl recipe adds dual clip 10; older verl took the token mean inside each micro-batch.
    """

    paper: ClassVar = Paper("DAPO: An Open-Source LLM Reinforcement Learning System at Scale", "2503.14476", 2025)
    summary: ClassVar = "GRPO with clip-higher, token mean, mixed groups only, no KL"
    stages: ClassVar = {
        "filter": "mixed groups",
        "advantage": "group z-score",
        "bounds": "1 - eps_low, 1 + eps_high",
        "surrogate": "clipped",
        "reduce": "token mean",
    }

    eps_low: float = 0.2
    """Lower clip range (paper)."""
    eps_high: float = 0.28
    """Upper clip range (paper)."""
    filter_groups: bool = True
    """Drop groups whose verdicts are all equal (paper, eq. 11)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(0 < self.eps_low < 1, "eps_low", self.eps_low, "in (0, 1)")
        require(self.eps_high > 0, "eps_high", self.eps_high, "> 0")

    def build(self) -> Method:
        """The method with these options."""

        def advantage(batch: TokenBatch) -> Tensor:
            return group_advantage(batch.reward, batch.group, batch.mask, singleton=self.singleton)

        def bounds(ratio: Tensor, signal: Tensor | None) -> Bounds:
            return constant_bounds(ratio, self.eps_low, self.eps_high)

        return Method(
            name="dapo",
            advantage=advantage,
            filter_groups=self.filter_groups,
            sampler_cap=self.sampler_cap,
            bounds=bounds,
            surrogate=partial(clipped_surrogate, dual_clip=self.dual_clip),
            kl_coef=self.kl_coef,
            reduce=token_mean,
        )
