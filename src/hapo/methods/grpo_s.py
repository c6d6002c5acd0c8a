"""GRPO-S: sequence-level reward shaping with policy entropy (arXiv 2508.04349)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..method import Method
from ..parts.bounds import constant_bounds
from ..parts.ratio import mean_ratio
from ..parts.reduce import sequence_mean
from ..parts.surrogate import clipped_surrogate
from ..stage import Stage
from ._options import one_of, require
from ._registry import register
from .gtpo import PAPER, EntropyShaped, share_advantage


@register("grpo_s")
@dataclass(frozen=True, kw_only=True)
class GRPOS(EntropyShaped):
    """GRPO-S: a response's reward is shaped by its share of the group's entropy; its weight is the mean ratio.

    Right responses: r = beta1 + beta2 n H_i / sum_k H_k over the n right ones, H_i the mean entropy of the
    response at rollout; wrong ones: r = -beta1 - beta2 m u_j / sum_k u_k, u = 1/H. A is the z-score of r
    (`variant`); w_i = (1/n_i) sum_t r_it, eq. 11; L = (1/S) sum_i -min(w A, clip(w, 1 - eps_low,
    1 + eps_high) A). Constant for autograd: everything but the ratio. A group of right answers only has
    advantages too, unless `filter_groups` drops it. No code of the authors is public.
    """

    paper: ClassVar = PAPER
    summary: ClassVar = "response rewards by their share of entropy, one ratio a response (GTPO's sibling)"

    beta1: float = 1.0
    """Weight of the outcome (paper)."""
    beta2: float = 0.1
    """Weight of the entropy share (paper)."""
    variant: Literal["padded", "joint", "own"] = "padded"
    """The set that normalises right (wrong) responses: all of the group, 0 for the other sign; one set for both
    signs; or the own sign's only. The paper's wording allows the first two."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("beta1", "beta2"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        one_of("variant", self.variant, ("padded", "joint", "own"))

    def build(self) -> Method:
        """The method with these options."""
        shares = {
            "base": self.beta1,
            "bonus": self.beta2,
            "threshold": self.threshold,
            "singleton": self.singleton,
        }
        reads = ("old_entropy", self.earned, self.judged, "group", "mask")
        return Method(
            **self.shared(),
            advantage=Stage(share_advantage, *reads, level="response", normalisation=self.variant, **shares),
            ratio=Stage(mean_ratio, "logp", "old_logp", "mask"),
            bounds=Stage(constant_bounds, "ratio", low=self.eps_low, high=self.eps_high),
            surrogate=Stage(clipped_surrogate, "ratio", "advantage", "bounds", dual_clip=self.dual_clip),
            penalty=self.kl(),
            reduce=sequence_mean,
        )
