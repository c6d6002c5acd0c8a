"""Entropy-Adv: entropy-based advantage shaping (arXiv 2506.14758)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..batch import TokenBatch
from ..method import Method
from ..parts.bounds import Bounds
from ..parts.shaping import entropy_bonus
from ._options import ClippedOptions, EntropySource, Paper, entropy_of, one_of, require
from ._registry import register


@register("entropy_adv")
@dataclass(frozen=True, kw_only=True)
class EntropyAdv(ClippedOptions):
    """Entropy-Adv: a token's advantage gains a bonus that grows with its entropy and never flips the sign.

    A' = A + min(alpha H, |A| / kappa), then DAPO's loss without its filter. It is no entropy regulariser:
    constant for autograd are advantages and H.
    """

    paper: ClassVar = Paper("Reasoning with Exploration: An Entropy Perspective", "2506.14758", 2025)
    summary: ClassVar = "advantage plus a capped bonus for the token's entropy"
    stages: ClassVar = {
        "advantage": "group z-score",
        "signal": "entropy",
        "reshape": "A + min(alpha H, |A| / kappa)",
        "bounds": "0.8 to 1.28",
        "surrogate": "clipped",
        "reduce": "token mean",
    }

    alpha: float = 0.4
    """Weight of the entropy (paper: 0.4 for GRPO, 0.1 for PPO)."""
    kappa: float = 2.0
    """The bonus is at most |A| / kappa (paper)."""
    eps_high: float = 0.28
    """Upper clip range (paper, appendix B)."""
    entropy_source: EntropySource = "current"
    """Entropies of the bonus: of the current policy (paper), or at rollout."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(self.alpha >= 0, "alpha", self.alpha, ">= 0")
        require(self.kappa > 1, "kappa", self.kappa, "> 1, so that the bonus never flips an advantage")
        one_of("entropy_source", self.entropy_source, ("current", "old"))

    def build(self) -> Method:
        """The method with these options."""
        return (
            super()
            .build()
            .replace(signal=self._entropy, live_signal=self.entropy_source == "current", reshape=self._reshape)
        )

    def _entropy(self, batch: TokenBatch) -> Tensor:
        return entropy_of(batch, self.entropy_source)

    def _reshape(self, advantage: Tensor, ratio: Tensor, signal: Tensor | None, bounds: Bounds) -> Tensor:
        assert signal is not None
        return entropy_bonus(advantage, signal, self.alpha, self.kappa)
