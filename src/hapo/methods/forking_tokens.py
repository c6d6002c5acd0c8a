"""DAPO on forking tokens: the 80/20 rule (arXiv 2506.01939)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..batch import TokenBatch
from ..method import Method
from ..parts.keep import most_uncertain
from ..parts.reduce import token_mean, valid_token_mean
from ._options import EntropySource, Paper, entropy_of, one_of, require
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
    stages: ClassVar = {**DAPO.stages, "keep": "top rho by entropy", "reduce": "mean of kept tokens"}

    rho: float = 0.2
    """Share of the tokens that learn (paper)."""
    entropy_source: EntropySource = "current"
    """Entropies that choose: of the current policy (release), which takes one more forward pass a step, or at
    rollout."""
    normaliser: Literal["kept", "valid"] = "kept"
    """Divide by the number of kept tokens (paper), or of all valid tokens (TRL's top_entropy_quantile)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(0 < self.rho <= 1, "rho", self.rho, "in (0, 1]")
        one_of("entropy_source", self.entropy_source, ("current", "old"))
        one_of("normaliser", self.normaliser, ("kept", "valid"))

    def build(self) -> Method:
        """The method with these options."""
        return (
            super()
            .build()
            .replace(
                keep=self._keep,
                live_keep=self.entropy_source == "current",
                reduce=token_mean if self.normaliser == "kept" else valid_token_mean,
            )
        )

    def _keep(self, batch: TokenBatch) -> Tensor:
        return most_uncertain(entropy_of(batch, self.entropy_source), batch.mask, self.rho)
