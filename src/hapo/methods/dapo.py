"""DAPO: decoupled clip and dynamic sampling policy optimisation (arXiv 2503.14476)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..method import Method
from ..parts.bounds import constant_bounds
from ..parts.reduce import token_mean
from ..parts.surrogate import clipped_surrogate
from ..stage import Stage
from ._options import ClippedOptions, GroupOptions, Paper
from ._registry import register


@register("dapo")
@dataclass(frozen=True, kw_only=True)
class DAPO(GroupOptions, ClippedOptions):
    """DAPO: GRPO with a wider upper bound, one mean over all tokens, only mixed groups, and no KL.

    L = (1/N) sum_it -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), eq. 8. Constant for autograd: advantages.
    Drawing fresh prompts for the dropped groups, and the length penalty (`parts.shaping`), are the trainer's
    work. The verl recipe adds dual clip 10; older verl took the token mean inside each micro-batch.
    """

    paper: ClassVar = Paper("DAPO: An Open-Source LLM Reinforcement Learning System at Scale", "2503.14476", 2025)
    summary: ClassVar = "GRPO with clip-higher, token mean, mixed groups only, no KL"

    eps_high: float = 0.28
    """Upper clip range (paper)."""
    filter_groups: bool = True
    """Drop groups whose verdicts are all equal (paper, eq. 11)."""

    def build(self) -> Method:
        """The method with these options."""
        return Method(
            **self.shared(),
            advantage=self.group_advantage(),
            bounds=Stage(constant_bounds, "ratio", low=self.eps_low, high=self.eps_high),
            surrogate=Stage(clipped_surrogate, "ratio", "advantage", "bounds", dual_clip=self.dual_clip),
            penalty=self.kl(),
            reduce=token_mean,
        )
