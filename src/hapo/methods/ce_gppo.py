"""CE-GPPO: gradient-preserving clipping (arXiv 2509.20712)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..method import Method
from ..parts.bounds import constant_bounds
from ..parts.reduce import token_mean
from ..parts.surrogate import gradient_preserving
from ..stage import Stage
from ._options import ClippedOptions, GroupOptions, Paper, require
from ._registry import register


@register("ce_gppo")
@dataclass(frozen=True, kw_only=True)
class CEGPPO(GroupOptions, ClippedOptions):
    """CE-GPPO: tokens that PPO would clip keep the gradient of the bound, times a coefficient.

    L = (1/N) sum_it -F A, with d/dlogp = -F A too, eq. 8: F = beta1 (1 - eps_low) where r is below and A < 0,
    beta2 (1 + eps_high) where r is above and A > 0, r elsewhere. Constant for autograd: advantages and F.
    """

    paper: ClassVar = Paper(
        "CE-GPPO: Coordinating Entropy via Gradient-Preserving Clipping Policy Optimization in Reinforcement "
        "Learning",
        "2509.20712",
        2025,
    )
    summary: ClassVar = "clipped tokens keep the gradient of the bound, times beta1 (low) or beta2 (high)"

    beta1: float = 0.5
    """Coefficient below the lower bound, A < 0 (paper's general setting; 0.75 for its 7B model)."""
    beta2: float = 1.0
    """Coefficient above the upper bound, A > 0 (paper)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("beta1", "beta2"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")

    def build(self) -> Method:
        """The method with these options."""
        kept = {"beta1": self.beta1, "beta2": self.beta2, "dual_clip": self.dual_clip}
        return Method(
            **self.shared(),
            advantage=self.group_advantage(),
            bounds=Stage(constant_bounds, "ratio", low=self.eps_low, high=self.eps_high),
            surrogate=Stage(gradient_preserving, "logp", "ratio", "advantage", "bounds", **kept),
            penalty=self.kl(),
            reduce=token_mean,
            breaks=frozenset({"detach"}),
        )
