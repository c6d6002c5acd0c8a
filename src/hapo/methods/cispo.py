"""CISPO: clipped importance-sampling-weight policy optimisation (arXiv 2506.13585)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..method import Method
from ..parts.bounds import constant_bounds
from ..parts.reduce import token_mean
from ..parts.surrogate import clipped_weight
from ..stage import Stage
from ._options import GroupOptions, Paper, pair, require
from ._registry import register


@register("cispo")
@dataclass(frozen=True, kw_only=True)
class CISPO(GroupOptions):
    """CISPO: the importance weight is clipped, not the update, so every token keeps a bounded gradient.

    L = (1/N) sum_it -sg(w) A logp, w = clip(r, is_weight_floor, is_weight_cap). Constant for autograd:
    advantages and w. The value of the loss holds log-probs and is not near 0 on-policy; its gradient is.
    """

    paper: ClassVar = Paper(
        "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention", "2506.13585", 2025
    )
    summary: ClassVar = "clips the importance weight instead of the update: every token keeps a gradient"

    is_weight_cap: float = 1.28
    """Largest importance weight itself, not its distance from 1; the paper's value is not published. 1.28 is
    DAPO's upper bound, for comparisons (TRL's ScaleRL preset: 5; verl's example: 1.2)."""
    is_weight_floor: float = 0.0
    """Smallest importance weight; 0 is no bound (paper)."""
    trust_region: Sequence[float] | None = None
    """(eps_low, eps_high) of the paper's unified form: weight 0 where PPO would clip; off in the paper's runs."""
    filter_groups: bool = True
    """Drop groups whose verdicts are all equal (paper, from DAPO)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(self.is_weight_cap >= 1, "is_weight_cap", self.is_weight_cap, ">= 1: it is the cap itself")
        require(0 <= self.is_weight_floor <= 1, "is_weight_floor", self.is_weight_floor, "in [0, 1]")
        if self.trust_region is not None:
            region: Any = pair("trust_region", self.trust_region, "a pair (eps_low, eps_high), or None")
            require(min(region) > 0, "trust_region", self.trust_region, "positive")
            object.__setattr__(self, "trust_region", region)

    def build(self) -> Method:
        """The method with these options."""
        low, high = 1.0 - self.is_weight_floor, self.is_weight_cap - 1.0
        return Method(
            **self.shared(),
            advantage=self.group_advantage(),
            bounds=Stage(constant_bounds, "ratio", low=low, high=high),
            surrogate=Stage(
                clipped_weight, "logp", "ratio", "advantage", "bounds", trust_region=self.trust_region
            ),
            penalty=self.kl(),
            reduce=token_mean,
            breaks=frozenset({"detach"}),
        )
