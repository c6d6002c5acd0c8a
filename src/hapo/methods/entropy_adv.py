"""Entropy-Adv: entropy-based advantage shaping (arXiv 2506.14758)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ..method import Method
from ..parts.bounds import constant_bounds
from ..parts.reduce import token_mean
from ..parts.shaping import entropy_bonus
from ..parts.surrogate import clipped_surrogate
from ..stage import Stage
from ._options import ClippedOptions, EntropySource, GroupOptions, Paper, entropy_from, one_of, require
from ._registry import register


@register("entropy_adv")
@dataclass(frozen=True, kw_only=True)
class EntropyAdv(GroupOptions, ClippedOptions):
    """Entropy-Adv: a token's advantage gains a bonus that grows with its entropy and never flips the sign.

    A' = A + min(alpha H, |A| / kappa), then DAPO's loss without its filter. It is no entropy regulariser:
    constant for autograd are advantages and H.
    """

    paper: ClassVar = Paper("Reasoning with Exploration: An Entropy Perspective", "2506.14758", 2025)
    summary: ClassVar = "advantage plus a capped bonus for the token's entropy"

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
        entropy, at = entropy_from(self.entropy_source, "loss")
        return Method(
            **self.shared(),
            signal=Stage(itself, entropy),
            signal_at=at,
            advantage=self.group_advantage(),
            bounds=Stage(constant_bounds, "ratio", low=self.eps_low, high=self.eps_high),
            shaping=Stage(entropy_bonus, "advantage", "signal", alpha=self.alpha, kappa=self.kappa),
            surrogate=Stage(clipped_surrogate, "ratio", "advantage", "bounds", dual_clip=self.dual_clip),
            penalty=self.kl(),
            reduce=token_mean,
        )


def itself(entropy: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The entropy is the signal."""
    return entropy
