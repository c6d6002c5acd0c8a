"""CHORD-phi: the token weight of CHORD (arXiv 2508.11408)."""

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


def undecided(logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """p (1 - p): 0 where the target is certain or impossible, 1/4 where it is as likely as not."""
    return -torch.exp(logp) * torch.expm1(logp)


@register("chord_phi")
@dataclass(frozen=True, kw_only=True)
class CHORDPhi(SupervisedOptions):
    """CHORD-phi: each target's loss times p (1 - p), so that what is known and what is far away both pull little.

    L = -sum_t m p (1 - p) logp / N, p = exp(logp) a constant for autograd, N the valid targets of the optimiser
    step. In the paper it is mixed with a GRPO loss; this is its supervised term.
    """

    paper: ClassVar = Paper(
        "On-Policy RL Meets Off-Policy Experts: Harmonizing Supervised Fine-Tuning and Reinforcement Learning "
        "via Dynamic Weighting",
        "2508.11408",
        2025,
    )
    summary: ClassVar = "each target's loss times p (1 - p): the certain and the far-off pull little"

    def build(self) -> Supervised:
        """The method with these options."""
        return Supervised(name=self.name, weight=Stage(undecided, "logp"))
