"""DAPO on forking tokens: the 80/20 rule (arXiv 2506.01939)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..method import Method
from ..parts.bounds import constant_bounds
from ..parts.reduce import token_mean
from ..parts.select import most_uncertain
from ..parts.surrogate import clipped_surrogate
from ..stage import Stage
from ._options import EntropySource, Paper, entropy_from, one_of, require
from ._registry import register
from .dapo import DAPO


@register("forking_tokens")
@dataclass(frozen=True, kw_only=True)
class ForkingTokens(DAPO):
    """DAPO in which only the tokens of highest entropy learn, divided by their number.

    L = sum_it F L_it / sum_it F, F = 1 on the ceil(rho N) most uncertain tokens of the optimiser step and all
    that tie with the last; L_it is DAPO's. Constant for autograd: advantages and F. The authors' code picks the
    tokens in each micro-batch of a rank; here the step is whole, so law 1 holds.
    """

    paper: ClassVar = Paper(
        "Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM "
        "Reasoning",
        "2506.01939",
        2025,
    )
    summary: ClassVar = "DAPO on the fifth of the tokens with the highest entropy"

    rho: float = 0.2
    """Share of the tokens that learn (paper)."""
    entropy_source: EntropySource = "current"
    """Entropies that choose: of the current policy (release), which takes one more forward pass a step, or those
    of the whole rollout batch, at rollout."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(0 < self.rho <= 1, "rho", self.rho, "in (0, 1]")
        one_of("entropy_source", self.entropy_source, ("current", "old"))

    def build(self) -> Method:
        """The method with these options."""
        entropy, at = entropy_from(self.entropy_source, "step")
        return Method(
            **self.shared(),
            advantage=self.group_advantage(),
            select=Stage(most_uncertain, entropy, "mask", rho=self.rho),
            select_at=at,
            bounds=Stage(constant_bounds, "ratio", low=self.eps_low, high=self.eps_high),
            surrogate=Stage(clipped_surrogate, "ratio", "advantage", "bounds", dual_clip=self.dual_clip),
            penalty=self.kl(),
            reduce=token_mean,
        )
