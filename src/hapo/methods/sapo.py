"""SAPO: soft adaptive policy optimisation (arXiv 2511.20347)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..method import Method
from ..parts.bounds import no_bounds
from ..parts.reduce import sequence_mean
from ..parts.surrogate import soft_gate
from ..stage import Stage
from ._options import GroupOptions, Paper, require
from ._registry import register


@register("sapo")
@dataclass(frozen=True, kw_only=True)
class SAPO(GroupOptions):
    """SAPO: a smooth gate in the place of the clipped ratio, steeper where the advantage is negative.

    L = (1/S) sum_i (1/n_i) sum_t -f(r) A, f(r) = (4 / tau) sigmoid(tau (r - 1)), tau = tau_pos where A > 0,
    tau_neg elsewhere. Constant for autograd: advantages and tau. f'(1) = 1, so at ratio 1 the gradient is GRPO's;
    f(1) = 2 / tau, so the value is not. TRL and verl compute the same.

    Raises:
        ValueError: a temperature is not positive and finite.
    """

    paper: ClassVar = Paper("Soft Adaptive Policy Optimization", "2511.20347", 2025)
    summary: ClassVar = "a smooth gate in the place of the clip, steeper for negative advantages"

    tau_pos: float = 1.0
    """Steepness of the gate where A > 0 (paper); towards 0 nothing is held back."""
    tau_neg: float = 1.05
    """Steepness of the gate where A <= 0 (paper)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name, tau in (("tau_pos", self.tau_pos), ("tau_neg", self.tau_neg)):
            require(0 < tau < math.inf, name, tau, "> 0 and finite")

    def build(self) -> Method:
        """The method with these options."""
        return Method(
            **self.shared(),
            advantage=self.group_advantage(),
            bounds=Stage(no_bounds, "ratio"),
            surrogate=Stage(soft_gate, "ratio", "advantage", tau_pos=self.tau_pos, tau_neg=self.tau_neg),
            penalty=self.kl(),
            reduce=sequence_mean,
        )
