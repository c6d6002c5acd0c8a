"""Dr. GRPO: GRPO without the divisions by length and by standard deviation (arXiv 2503.20783)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ._options import Paper
from ._registry import register
from .grpo import GRPO


@register("dr_grpo")
@dataclass(frozen=True, kw_only=True)
class DrGRPO(GRPO):
    """Dr. GRPO: A = R - mean, and per-response sums over a constant C instead of per-response means.

    L = (1/S) sum_i sum_t -min(r A, clip(r, 1 - eps, 1 + eps) A) / C, C = `length_limit`. The paper's objective
    has no C; its code divides by the limit of generation, which rescales the learning rate only. Constant for
    autograd: advantages.
    """

    paper: ClassVar = Paper("Understanding R1-Zero-Like Training: A Critical Perspective", "2503.20783", 2025)
    summary: ClassVar = "GRPO without the division by length and by standard deviation, no KL"
    stages: ClassVar = {
        "advantage": "reward minus group mean",
        "bounds": "0.8 to 1.2",
        "surrogate": "clipped",
        "reduce": "sequence mean of token sums / C",
    }

    kl_coef: float = 0.0
    """Weight of the k3 penalty; the paper has none."""
    scale: bool = False
    """Divide advantages by the group's standard deviation; not here (paper)."""
    reduction: Literal["sequence_mean", "token_mean", "sequence_sum"] = "sequence_sum"
    """Per-response sums over a constant (paper)."""
