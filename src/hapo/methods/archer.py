"""Archer: dual-token constraints (arXiv 2507.15778)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..method import Method
from ..parts.bounds import gated_bounds
from ..parts.entropy import above_quantile
from ..parts.penalty import gated_kl
from ..parts.reduce import token_mean
from ..parts.surrogate import clipped_surrogate
from ..stage import Stage
from ._options import EntropySource, GroupOptions, Paper, entropy_from, one_of, require
from ._registry import register


@register("archer")
@dataclass(frozen=True, kw_only=True)
class Archer(GroupOptions):
    """Archer: uncertain tokens of a response get a wide clip and no KL, the others a normal clip and a KL penalty.

    L = (1/N) sum_it [ -min(r A, clip(r, 1 - e, 1 + e) A) + b D ], eq. 5: e = eps_reasoning, b = kl_reasoning
    where H >= the rho-quantile (linear) of its response, e = eps_knowledge, b = kl_coef elsewhere; D is the k3
    estimate. Constant for autograd: advantages, the gate, e and b.

    `variant="release"` computes what the authors' code does: the gate is strict, and D is averaged over gated
    and other tokens apart, which multiplies the weights by N / N_gated and N / N_other. These counts are the
    micro-batch's, so it breaks law 1.
    """

    paper: ClassVar = Paper(
        "Stabilizing Knowledge, Promoting Reasoning: Dual-Token Constraints for RLVR", "2507.15778", 2025
    )
    summary: ClassVar = "wide clip without KL on each response's uncertain tokens, normal clip with KL elsewhere"

    rho: float = 0.8
    """Quantile of a response's entropies from which a token counts as uncertain (paper)."""
    eps_knowledge: float = 0.2
    """Clip range of certain tokens, both sides (paper, release)."""
    eps_reasoning: float = 0.5
    """Clip range of uncertain tokens, both sides (paper, release)."""
    kl_coef: float = 0.001
    """Weight of the k3 penalty on certain tokens, beta_k (paper, release)."""
    kl_reasoning: float = 0.0
    """The same on uncertain tokens, beta_r (paper, release)."""
    dual_clip: float | None = None
    """Cap c > 1 on the ratio of negative advantages: off (paper), 10 (release script)."""
    entropy_source: EntropySource = "current"
    """Entropies of the gate: of the current policy (release), or at rollout."""
    variant: Literal["paper", "release"] = "paper"
    """The paper's definitions, or what the authors' code computes."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        one_of("variant", self.variant, ("paper", "release"))
        one_of("entropy_source", self.entropy_source, ("current", "old"))
        require(0 <= self.rho <= 1, "rho", self.rho, "in [0, 1]")
        for name in ("eps_knowledge", "eps_reasoning"):
            require(0 < getattr(self, name) < 1, name, getattr(self, name), "in (0, 1)")
        require(not self.unbiased_kl, "unbiased_kl", self.unbiased_kl, "False: Archer weighs its own penalty")
        require(self.kl_reasoning >= 0, "kl_reasoning", self.kl_reasoning, ">= 0")
        require(self.dual_clip is None or self.dual_clip > 1, "dual_clip", self.dual_clip, "> 1, or None")

    def build(self) -> Method:
        """The method with these options."""
        release, penalised = self.variant == "release", self.kl_coef > 0 or self.kl_reasoning > 0
        entropy, at = entropy_from(self.entropy_source, "loss")
        weights = {"inside": self.kl_reasoning, "outside": self.kl_coef}
        kl = Stage(gated_kl, "logp", "ref_logp", "signal", "mask", **weights, apart=release)
        return Method(
            **self.shared(),
            signal=Stage(above_quantile, entropy, "mask", level=self.rho, strict=release),
            signal_at=at,
            advantage=self.group_advantage(),
            bounds=Stage(gated_bounds, "signal", inside=self.eps_reasoning, outside=self.eps_knowledge),
            surrogate=Stage(clipped_surrogate, "ratio", "advantage", "bounds", dual_clip=self.dual_clip),
            penalty=kl if penalised else None,
            reduce=token_mean,
            breaks=frozenset({"split"} if release and penalised else ()),
        )
