"""GSPO: group sequence policy optimisation (arXiv 2507.18071)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..method import Method
from ..parts.bounds import constant_bounds
from ..parts.ratio import sequence_ratio
from ..parts.reduce import sequence_mean
from ..parts.surrogate import clipped_surrogate
from ..stage import Stage
from ._options import ClippedOptions, GroupOptions, Paper, one_of
from ._registry import register


@register("gspo")
@dataclass(frozen=True, kw_only=True)
class GSPO(GroupOptions, ClippedOptions):
    """GSPO: one importance ratio a response, the geometric mean of its token ratios, clipped as a whole.

    L = (1/S) sum_i -min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i), eq. 5, with
    s_i = exp((1/n_i) sum_t (logp - old_logp)). Constant for autograd: advantages. A token of an unclipped
    response has the gradient -A s_i / (S n_i).
    """

    paper: ClassVar = Paper("Group Sequence Policy Optimization", "2507.18071", 2025)
    summary: ClassVar = "one ratio a response, the geometric mean; clips whole responses"

    eps_low: float = 3e-4
    """Lower clip range (paper, section 5.1)."""
    eps_high: float = 4e-4
    """Upper clip range (paper, section 5.1)."""
    form: Literal["sequence", "token"] = "sequence"
    """GSPO, or GSPO-token (paper): the same value; the same gradient too where no weight differs within a
    response."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        one_of("form", self.form, ("sequence", "token"))

    def build(self) -> Method:
        """The method with these options."""
        return Method(
            **self.shared(),
            advantage=self.group_advantage(),
            ratio=Stage(sequence_ratio, "logp", "old_logp", "mask", form=self.form),
            bounds=Stage(constant_bounds, "ratio", low=self.eps_low, high=self.eps_high),
            surrogate=Stage(clipped_surrogate, "ratio", "advantage", "bounds", dual_clip=self.dual_clip),
            penalty=self.kl(),
            reduce=sequence_mean,
            breaks=frozenset({"detach"} if self.form == "token" else ()),
        )
