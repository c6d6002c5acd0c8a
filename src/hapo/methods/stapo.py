"""STAPO: spurious-token-aware policy optimisation (arXiv 2602.15620)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..method import Method
from ..parts.bounds import constant_bounds
from ..parts.reduce import token_mean
from ..parts.select import not_spurious
from ..parts.surrogate import clipped_surrogate
from ..stage import Stage
from ._options import ClippedOptions, EntropySource, GroupOptions, Paper, entropy_from, one_of, require
from ._registry import register


@register("stapo")
@dataclass(frozen=True, kw_only=True)
class STAPO(GroupOptions, ClippedOptions):
    """STAPO: rare tokens that a confident policy took in a right answer do not learn.

    L = sum_it I L_it / sum_it I: I = 0 where A > 0, exp(logp) < tau_p, and H is below the q-quantile (linear)
    of the entropies of such tokens in the optimiser step; L_it is the clipped surrogate. Constant for autograd:
    advantages and I. No code of the authors is public.
    """

    paper: ClassVar = Paper("STAPO: Spurious-Token-Aware Policy Optimization", "2602.15620", 2026)
    summary: ClassVar = "rare low-entropy tokens of right answers do not learn"

    tau_p: float = 0.002
    """Probability below which a token is rare (paper)."""
    q: float = 0.75
    """Quantile of entropy below which a rare token is dropped (revised paper)."""
    quantile_scope: Literal["candidates", "all"] = "candidates"
    """Whose entropies the quantile is of: rare tokens with A > 0 (revised paper), or all valid tokens (first
    version)."""
    entropy_source: EntropySource = "current"
    """Probabilities and entropies that choose: of the current policy (paper), which takes one more forward pass
    a step, or those of the whole rollout batch, at rollout."""
    eps_high: float = 0.28
    """Upper clip range (paper)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(0 <= self.tau_p <= 1, "tau_p", self.tau_p, "in [0, 1]")
        require(0 <= self.q <= 1, "q", self.q, "in [0, 1]")
        one_of("quantile_scope", self.quantile_scope, ("candidates", "all"))
        one_of("entropy_source", self.entropy_source, ("current", "old"))

    def build(self) -> Method:
        """The method with these options."""
        entropy, at = entropy_from(self.entropy_source, "step")
        logp = "logp" if self.entropy_source == "current" else "old_logp"
        rare = {"tau_p": self.tau_p, "q": self.q, "scope": self.quantile_scope}
        return Method(
            **self.shared(),
            advantage=self.group_advantage(),
            select=Stage(not_spurious, logp, entropy, "advantage", "mask", **rare),
            select_at=at,
            bounds=Stage(constant_bounds, "ratio", low=self.eps_low, high=self.eps_high),
            surrogate=Stage(clipped_surrogate, "ratio", "advantage", "bounds", dual_clip=self.dual_clip),
            penalty=self.kl(),
            reduce=token_mean,
        )
