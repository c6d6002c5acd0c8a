"""GRPO-S: sequence-level reward shaping with policy entropy (arXiv 2508.04349)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..batch import TokenBatch
from ..method import Method
from ..parts.entropy import mean_entropy
from ..parts.ratio import mean_ratio, sequence_ratio
from ..parts.reduce import sequence_mean
from ._options import one_of, require
from ._registry import register
from .gtpo import PAPER, EntropyShaped


@register("grpo_s")
@dataclass(frozen=True, kw_only=True)
class GRPOS(EntropyShaped):
    """GRPO-S: a response's reward is shaped by its share of the group's entropy; its weight is the mean ratio.

    Right responses: r = beta1 + beta2 n H_i / sum_k H_k over the n right ones, H_i the mean entropy of the
    response at rollout; wrong ones: r = -beta1 - beta2 m u_j / sum_k u_k, u = 1/H. A is the z-score of r
    (`normalisation`); w_i = (1/n_i) sum_t r_it, eq. 11; L = (1/S) sum_i -min(w A, clip(w, 1 - eps_low,
    1 + eps_high) A). Constant for autograd: everything but the ratio. A group of right answers only has
    advantages too, unless `filter_groups` drops it. No code of the authors is public.
    """

    paper: ClassVar = PAPER
    summary: ClassVar = "response rewards by their share of entropy, one ratio a response (GTPO's sibling)"
    stages: ClassVar = {
        "advantage": "z-score of entropy-shaped response rewards, per sign",
        "ratio": "arithmetic mean over the response",
        "bounds": "0.8 to 1.28",
        "surrogate": "clipped",
        "reduce": "sequence mean of token means",
    }

    beta1: float = 1.0
    """Weight of the outcome (paper)."""
    beta2: float = 0.1
    """Weight of the entropy share (paper)."""
    normalisation: Literal["padded", "joint", "own"] = "padded"
    """The set that normalises right (wrong) responses: all of the group, 0 for the other sign; one set for both
    signs; or the own sign's only. The paper's wording allows the first two."""
    weight: Literal["arithmetic", "geometric"] = "arithmetic"
    """Mean of the token ratios: arithmetic (paper, eq. 11), or geometric (its appendix)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("beta1", "beta2"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        one_of("normalisation", self.normalisation, ("padded", "joint", "own"))
        one_of("weight", self.weight, ("arithmetic", "geometric"))

    def build(self) -> Method:
        """The method with these options."""
        ratio = mean_ratio if self.weight == "arithmetic" else sequence_ratio
        return super().build().replace(ratio=ratio, reduce=sequence_mean)

    def _advantage(self, batch: TokenBatch) -> Tensor:
        entropy = mean_entropy(self._entropy(batch), batch.mask).unsqueeze(1)
        rows = batch.mask.any(-1, keepdim=True)
        advantage = self._shaped(batch, entropy, rows, self.beta1, self.beta2, self.normalisation)
        return advantage.expand(batch.mask.shape)
