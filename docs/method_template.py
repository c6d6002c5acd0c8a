"""My method: what it does in one sentence (arXiv 0000.00000)."""  # EDIT here and wherever EDIT stands

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..method import Method
from ..parts.bounds import Bounds, constant_bounds
from ..parts.reduce import token_mean
from ..parts.surrogate import Surrogate
from ..stage import Stage
from ._options import GroupOptions, Paper, require
from ._registry import register


@register("my_method")  # EDIT: the name of this file
@dataclass(frozen=True, kw_only=True)
class MyMethod(GroupOptions):  # EDIT: add ClippedOptions for eps_low, eps_high, dual_clip; or DAPO, GRPO
    """My method: the ratio has a cap, whatever the sign of the advantage.

    L = (1/N) sum_it -min(r, cap) A, N the valid tokens of the step. Constant for autograd: advantages. EDIT: the
    equation with its number, the normaliser, what is detached, and where paper and released code disagree.
    """

    paper: ClassVar = Paper("The title of the paper", "0000.00000", 2026)
    summary: ClassVar = "caps the ratio of every token"  # EDIT: the line in `hapo methods`

    # EDIT: the options, each with its meaning, its unit and the source of its default in the string below it.
    cap: float = 2.0
    """Largest ratio (paper)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(self.cap >= 1, "cap", self.cap, ">= 1")

    def build(self) -> Method:
        """The method with these options."""
        return Method(
            **self.shared(),  # name, filter, sampler's weight, temperature
            advantage=self.group_advantage(),
            # EDIT: a part, and the fields of the record that it is given, in order; then its options.
            bounds=Stage(constant_bounds, "ratio", low=1.0, high=self.cap - 1.0),  # without any: no_bounds
            surrogate=Stage(capped_surrogate, "ratio", "advantage", "bounds"),
            penalty=self.kl(),
            reduce=token_mean,
        )


# EDIT: delete this if a function of hapo.parts does what you need. If another method may need it, move it into the
# file of its stage, here src/hapo/parts/surrogate.py.
def capped_surrogate(ratio: Float[Tensor, "B T"], advantage: Float[Tensor, "B T"], bounds: Bounds) -> Surrogate:
    """-min(r, 1 + high) A; d/dlogp = -A r where r <= 1 + high, 0 beyond."""
    beyond = ratio > 1.0 + bounds.high
    capped = torch.where(beyond, 1.0 + bounds.high, ratio)
    return Surrogate(-capped * advantage, torch.zeros_like(beyond), beyond)
