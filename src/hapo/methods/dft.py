"""DFT: dynamic fine-tuning (arXiv 2508.05629)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..stage import Stage
from ..supervised import Supervised
from ._options import Paper, SupervisedOptions
from ._registry import register


def probability(logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """p = exp(logp), the probability of each target."""
    return torch.exp(logp)


@register("dft")
@dataclass(frozen=True, kw_only=True)
class DFT(SupervisedOptions):
    """DFT: each target's loss times its own probability, which takes the 1 / p out of the gradient of SFT.

    L = -sum_t m p logp / N, p = exp(logp) a constant for autograd, N the valid targets of the optimiser step. Read
    as a policy gradient, SFT has a reward of 1 / p on the demonstrated token; here it is 1. TRL's "dft" computes
    the same.
    """

    paper: ClassVar = Paper(
        "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification",
        "2508.05629",
        2025,
    )
    summary: ClassVar = "each target's loss times its probability: unlikely targets pull less"

    def build(self) -> Supervised:
        """The method with these options."""
        return Supervised(name=self.name, weight=Stage(probability, "logp"))
