"""ASPO: asymmetric importance sampling policy optimisation (arXiv 2510.06062)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..method import Method
from ..parts.bounds import constant_bounds, gated_bounds
from ..parts.entropy import above_quantile
from ..parts.reduce import sequence_mean
from ..parts.surrogate import asymmetric_ratio
from ..stage import Stage
from ._options import ClippedOptions, EntropySource, GroupOptions, Paper, entropy_from, one_of, require
from ._registry import register


@register("aspo")
@dataclass(frozen=True, kw_only=True)
class ASPO(GroupOptions, ClippedOptions):
    """ASPO: GRPO's clip decides which tokens learn; those of positive advantage weigh 1/r instead of r.

    d loss / d logp, before the mean of means: -A r inside the clip where A < 0, -A / r where A > 0, at most
    c_neg |A| and c_pos |A|, 0 where GRPO clips (`parts.surrogate.asymmetric_ratio` has the table). KL as in
    GRPO. Constant for autograd: advantages, bounds and every weight.

    The authors' code widens the clip of the most uncertain fifth of each response: `eps_uncertain=0.4`.
    """

    paper: ClassVar = Paper(
        "When Importance Sampling Misallocates Credit: Asymmetric Ratios for Outcome-Supervised RL",
        "2510.06062",
        2025,
    )
    summary: ClassVar = "tokens of positive advantage weigh 1/ratio, with a soft cap"

    c_neg: float = 3.0
    """Cap of the weight where A < 0; the gradient stays (code; a figure of the paper shows 3). With
    `dual_clip` at or below it the gradient ends there instead, which is the paper's text."""
    c_pos: float = 3.0
    """Cap of the weight where A > 0; the gradient stays (code)."""
    kl_coef: float = 0.001
    """Weight of the k3 penalty (paper and scripts)."""
    eps_uncertain: float | None = None
    """Clip range on both sides for tokens above their response's `rho`-quantile of entropy: 0.4 in the code,
    none in the paper. `eps_low` must then equal `eps_high`."""
    rho: float = 0.8
    """Quantile (linear) of a response's entropies above which `eps_uncertain` holds (code)."""
    entropy_source: EntropySource = "current"
    """Entropies that `eps_uncertain` goes by: of the current policy (code), or at rollout."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("c_neg", "c_pos"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        one_of("entropy_source", self.entropy_source, ("current", "old"))
        require(0 <= self.rho <= 1, "rho", self.rho, "in [0, 1]")
        if self.eps_uncertain is not None:
            require(0 < self.eps_uncertain < 1, "eps_uncertain", self.eps_uncertain, "in (0, 1), or None")
            require(self.eps_low == self.eps_high, "eps_high", self.eps_high, "eps_low where eps_uncertain is set")

    def build(self) -> Method:
        """The method with these options."""
        entropy, at = entropy_from(self.entropy_source, "loss")
        uncertain = Stage(above_quantile, entropy, "mask", level=self.rho, strict=True)
        wider = Stage(gated_bounds, "signal", inside=self.eps_uncertain, outside=self.eps_low)
        caps = {"c_neg": self.c_neg, "c_pos": self.c_pos, "dual_clip": self.dual_clip}
        plain = self.eps_uncertain is None
        return Method(
            **self.shared(),
            signal=None if plain else uncertain,
            signal_at=at,
            advantage=self.group_advantage(),
            bounds=Stage(constant_bounds, "ratio", low=self.eps_low, high=self.eps_high) if plain else wider,
            surrogate=Stage(asymmetric_ratio, "logp", "ratio", "advantage", "bounds", **caps),
            penalty=self.kl(),
            reduce=sequence_mean,
            breaks=frozenset({"detach"}),
        )
