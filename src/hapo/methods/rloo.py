"""RLOO: REINFORCE with a leave-one-out baseline (arXiv 2402.14740)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..method import Method
from ..parts.advantage import Singleton, leave_one_out_advantage
from ..parts.bounds import constant_bounds, no_bounds
from ..parts.credit import Finished, kl_in_reward, position_returns
from ..parts.reduce import sequence_sum
from ..parts.surrogate import clipped_surrogate, unclipped_surrogate
from ..stage import Stage
from ._options import Options, Paper, pair, require
from ._registry import register


@register("rloo")
@dataclass(frozen=True, kw_only=True)
class RLOO(Options):
    """RLOO: a response's reward minus the mean reward of the others of its group; whole responses are the actions.

    L = -(1/S) sum_i sum_t r A_i, A_i = R_i - mean_{j != i} R_j; with r = 1 its gradient is REINFORCE's. A KL
    penalty goes into the reward before the baseline: R_i - beta sum_t (old_logp - ref_logp), beta = `kl_coef`;
    with token rewards into each token's, r_t - beta (old_logp - ref_logp), before the returns.
    Constant for autograd: advantages.
    """

    paper: ClassVar = Paper(
        "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
        "2402.14740",
        2024,
    )
    summary: ClassVar = "leave-one-out baseline, no clipping, sums over a response"

    kl_coef: float = 0.0
    """beta of the KL in the reward, not a loss term; 0.03 to 0.1 in the paper, with a reward model."""
    clip: Sequence[float] | None = None
    """(eps_low, eps_high) of a clipped surrogate; none in the paper (verl clips when RLOO meets its default
    loss)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(not self.unbiased_kl, "unbiased_kl", self.unbiased_kl, "False: RLOO's penalty is in the reward")
        if self.clip is not None:
            clip: Any = pair("clip", self.clip, "a pair (eps_low, eps_high), or None")
            require(0 < clip[0] < 1 and clip[1] > 0, "clip", self.clip, "0 < eps_low < 1 and eps_high > 0")
            object.__setattr__(self, "clip", clip)

    def build(self) -> Method:
        """The method with these options."""
        by_token = self.advantage == "token_reward"
        reads, options = (self.earned, "group", "mask"), {"singleton": self.singleton}
        advantage = Stage(leave_one_out_advantage, *reads, **options)
        credit = {}
        if self.kl_coef and by_token:
            returns = {"coef": self.kl_coef, "gamma": self.gamma, "finished": self.finished}
            logps = ("old_logp", "ref_logp")
            credit["credit"] = Stage(penalised_returns, "token_reward", "reward", "mask", *logps, **returns)
        elif self.kl_coef:
            advantage = Stage(penalised_advantage, *reads, "old_logp", "ref_logp", coef=self.kl_coef, **options)
        return Method(
            **self.shared(**credit),
            advantage=advantage,
            bounds=Stage(constant_bounds, "ratio", low=self.clip[0], high=self.clip[1])
            if self.clip
            else Stage(no_bounds, "ratio"),
            surrogate=(
                Stage(clipped_surrogate, "ratio", "advantage", "bounds")
                if self.clip
                else Stage(unclipped_surrogate, "ratio", "advantage")
            ),
            reduce=sequence_sum,
        )


def penalised_advantage(
    reward: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    old_logp: Float[Tensor, "B T"],
    ref_logp: Float[Tensor, "B T"],
    coef: float,
    singleton: Singleton = "zero",
) -> Float[Tensor, "B T"]:
    """`leave_one_out_advantage` of R_i - coef sum_t (old_logp - ref_logp), the KL at rollout in the reward."""
    penalised = reward - coef * torch.where(mask, old_logp - ref_logp, 0.0).sum(-1)
    return leave_one_out_advantage(penalised, group, mask, singleton=singleton)


def penalised_returns(
    token_reward: Float[Tensor, "B T"],
    reward: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    old_logp: Float[Tensor, "B T"],
    ref_logp: Float[Tensor, "B T"],
    coef: float,
    gamma: float = 1.0,
    finished: Finished = "last",
) -> Float[Tensor, "B T"]:
    """`position_returns` of r_t - coef (old_logp - ref_logp), the KL at rollout in the reward of each token."""
    penalised = kl_in_reward(token_reward, old_logp, ref_logp, mask, coef)
    return position_returns(penalised, reward, mask, gamma, finished)
