"""ESPO: ELBO-based sequence-level policy optimisation of diffusion models (arXiv 2512.03759)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..method import Method
from ..parts.advantage import group_advantage, leave_one_out_advantage
from ..parts.bounds import constant_bounds
from ..parts.elbo import Elbo
from ..parts.penalty import k1, k3
from ..parts.ratio import sequence_ratio
from ..parts.reduce import sequence_mean
from ..parts.surrogate import clipped_surrogate
from ..stage import Stage
from ._diffusion import DiffusionOptions
from ._options import Paper, one_of, require
from ._registry import register

STD_EPS = 1e-4
"""Added to the deviation of a group's rewards (the authors' code)."""

Estimator = Literal["k1", "k2", "k3"]


@register("espo")
@dataclass(frozen=True, kw_only=True)
class ESPO(DiffusionOptions):
    """ESPO: one importance ratio a response, of ELBOs on the same masks, for masked-diffusion language models.

    L = (1/S) sum_i [ -min(r_i A_i, clip(r_i, 1 - eps_low, 1 + eps_high) A_i) + beta (E_i - E_i^ref)^2 / (2 L_i) ],
    r_i = exp((E_i - E_i^old) / L_i), A_i = R_i - mean_{j != i} R_j, beta = `kl_coef`. E is the ELBO's estimate
    (`hapo.parts.elbo`), the sum of `logp` over the L_i positions of the response, which are all of its fixed
    length. Constant for autograd: advantages, E^old, E^ref, masks. A position of an unclipped response has the
    gradient -A_i r_i / (S L_i).
    """

    paper: ClassVar = Paper(
        "Principled RL for Diffusion LLMs Emerges from a Sequence-Level Perspective", "2512.03759", 2025
    )
    summary: ClassVar = "diffusion models: one ratio a response, of ELBOs on shared masks; squared penalty"

    draws: int = 2
    """M, masks drawn for each response and update (paper)."""
    coupled: bool = True
    """Each mask goes with its complement (paper; always in the authors' code)."""
    baseline: Literal["leave_one_out", "mean"] = "leave_one_out"
    """Mean reward of the others (the authors' code), or of the group (paper), which is (G - 1) / G times as
    much."""
    scale_rewards: Literal["group", "none"] = "none"
    """Divide by the deviation of the group's rewards + 1e-4, or by nothing (the authors' configuration)."""
    kl_coef: float = 0.0
    """beta: 1e-3 on GSM8K and MATH, 3e-3 on Countdown, 1e-2 on Sudoku and code (the authors' scripts)."""
    kl_estimator: Estimator = "k2"
    """Half the squared difference of the ELBOs (paper); k1, the difference, and k3 are what the paper rejects."""
    kl_per_position: bool = True
    """The penalty is divided by the length too (the authors' code, whose beta the defaults are); False: it is not
    (the paper's equation)."""

    def __post_init__(self) -> None:
        """Check the choices."""
        super().__post_init__()
        require(self.draws >= 1, "draws", self.draws, ">= 1")
        one_of("baseline", self.baseline, ("leave_one_out", "mean"))
        one_of("scale_rewards", self.scale_rewards, ("group", "none"))
        one_of("kl_estimator", self.kl_estimator, ("k1", "k2", "k3"))
        require(not self.unbiased_kl, "unbiased_kl", self.unbiased_kl, "False: the penalty is one of ELBOs")

    def build(self) -> Method:
        """The method with these options."""
        baseline = leave_one_out_advantage if self.baseline == "leave_one_out" else group_advantage
        penalty = {
            "coef": self.kl_coef,
            "estimator": self.kl_estimator,
            "per_position": self.kl_per_position,
        }
        return Method(
            **self.shared(),
            likelihood=Elbo(self.draws, self.coupled),
            advantage=Stage(
                baseline,
                *(self.earned, "group", "mask"),
                singleton=self.singleton,
                scale=self.scale_rewards,
                std_eps=STD_EPS,
            ),
            ratio=Stage(sequence_ratio, "logp", "old_logp", "mask"),
            bounds=Stage(constant_bounds, "ratio", low=self.eps_low, high=self.eps_high),
            surrogate=Stage(clipped_surrogate, "ratio", "advantage", "bounds"),
            penalty=Stage(elbo_penalty, "logp", "ref_logp", "mask", **penalty) if self.kl_coef else None,
            reduce=sequence_mean,
        )


def elbo_penalty(
    logp: Float[Tensor, "B T"],
    ref_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    coef: float = 1.0,
    estimator: Estimator = "k2",
    per_position: bool = True,
) -> Float[Tensor, "B T"]:
    """coef times the estimate of KL(policy || reference) from whole ELBOs, the same number on all L_i positions.

    With d = E - E^ref: k2 = d^2 / 2, its gradient d; k1 = d and k3 = exp(-d) + d - 1, both with d clamped to 20 on
    either side. d is not clamped in k2: 20 nats are 0.08 a position of 256, and there the penalty must still act.
    """
    e, e_ref = (torch.where(mask, x, 0.0).sum(-1, keepdim=True) for x in (logp, ref_logp.detach()))
    estimate = (e - e_ref).square() / 2 if estimator == "k2" else {"k1": k1, "k3": k3}[estimator](e, e_ref)
    if per_position:
        estimate = estimate / mask.sum(-1, keepdim=True).clamp_min(1)
    return coef * estimate.expand_as(logp)
