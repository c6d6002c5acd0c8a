"""LUSPO: length-unbiased sequence policy optimisation (arXiv 2602.05261)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..method import Method
from ..parts.bounds import constant_bounds
from ..parts.ratio import sequence_ratio
from ..parts.reduce import sequence_sum
from ..parts.surrogate import clipped_surrogate
from ..stage import Stage
from ._options import ClippedOptions, GroupOptions, Paper
from ._registry import register


@register("luspo")
@dataclass(frozen=True, kw_only=True)
class LUSPO(GroupOptions, ClippedOptions):
    """LUSPO: GSPO with each response's loss times its length, so that long responses do not learn less per token.

    L = (1/S) sum_i -n_i min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i), with GSPO's
    s_i = exp((1/n_i) sum_t (logp - old_logp)). Constant for autograd: advantages. A token of an unclipped
    response has the gradient -A s_i / S, whatever the response's length. TRL computes the same.
    """

    paper: ClassVar = Paper(
        "Length-Unbiased Sequence Policy Optimization: Revealing and Controlling Response Length Variation "
        "in RLVR",
        "2602.05261",
        2026,
    )
    summary: ClassVar = "GSPO with each response's loss times its length: no token learns less in a long one"

    eps_low: float = 2e-3
    """Lower clip range (paper, section 5.1, as TRL cites it)."""
    eps_high: float = 2.5e-3
    """Upper clip range (paper, section 5.1, as TRL cites it)."""

    def build(self) -> Method:
        """The method with these options."""
        return Method(
            **self.shared(),
            advantage=self.group_advantage(),
            ratio=Stage(sequence_ratio, "logp", "old_logp", "mask"),
            bounds=Stage(constant_bounds, "ratio", low=self.eps_low, high=self.eps_high),
            surrogate=Stage(clipped_surrogate, "ratio", "advantage", "bounds", dual_clip=self.dual_clip),
            penalty=self.kl(),
            reduce=sequence_sum,
        )
