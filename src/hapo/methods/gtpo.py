"""GTPO: token-level reward shaping with policy entropy (arXiv 2508.04349)."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..method import Method
from ..parts.advantage import STD_EPS, Singleton, signed_advantage
from ..parts.bounds import constant_bounds
from ..parts.entropy import mean_entropy
from ..parts.groups import alone, columns, group_index
from ..parts.reduce import token_mean
from ..parts.shaping import entropy_shaped_reward
from ..parts.surrogate import clipped_surrogate
from ..stage import Stage
from ._options import ClippedOptions, Paper, one_of, require
from ._registry import register

PAPER = Paper("GTPO and GRPO-S: Token and Sequence-Level Reward Shaping with Policy Entropy", "2508.04349", 2025)


@dataclass(frozen=True, kw_only=True)
class EntropyShaped(ClippedOptions, ABC):
    """What GTPO and GRPO-S share: right and wrong responses are shaped, and normalised, apart."""

    eps_high: float = 0.28
    """Upper clip range; the paper's numbers 0.2 and 0.28, read as DAPO's ratio clip."""
    threshold: float = 0.5
    """A response is right where its verdict is above this; with token rewards, a token is where its return is."""

    @property
    def judged(self) -> str:
        """The field of the record that says what is right."""
        return "verdict" if self.advantage == "outcome" else self.earned


@register("gtpo")
@dataclass(frozen=True, kw_only=True)
class GTPO(EntropyShaped):
    """GTPO: each token's reward is shaped by its share of the entropy at its position, then normalised per sign.

    Right responses: r = alpha1 + alpha2 d_t H_it / sum_k H_kt over the d_t right responses alive at t. Wrong
    ones: r = -alpha1 - alpha2 h_t u_jt / sum_k u_kt, u = 1/H. A is the z-score of r, apart for right and wrong
    (`variant`), in a token mean of the clipped surrogate, eq. 7. Entropies are those at rollout. Constant
    for autograd: everything but the ratio. A group of right answers only has advantages too, unless
    `filter_groups` drops it.

    Not to be confused with another paper's GTPO, arXiv 2508.03772. No code of the authors is public.
    """

    paper: ClassVar = PAPER
    summary: ClassVar = "token rewards by the share of entropy at each position (arXiv 2508.04349, not 2508.03772)"

    alpha1: float = 1.0
    """Weight of the outcome (paper)."""
    alpha2: float = 0.1
    """Weight of the entropy share (paper)."""
    variant: Literal["padded", "own"] = "padded"
    """The set that normalises right (wrong) tokens: all tokens of the group, 0 for those of the other sign, or
    the own sign's only. The paper's wording allows both; only the first keeps right tokens above 0."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("alpha1", "alpha2"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        one_of("variant", self.variant, ("padded", "own"))

    def build(self) -> Method:
        """The method with these options."""
        shares = {
            "base": self.alpha1,
            "bonus": self.alpha2,
            "threshold": self.threshold,
            "singleton": self.singleton,
        }
        reads = ("old_entropy", self.earned, self.judged, "group", "mask")
        return Method(
            **self.shared(),
            advantage=Stage(share_advantage, *reads, normalisation=self.variant, **shares),
            bounds=Stage(constant_bounds, "ratio", low=self.eps_low, high=self.eps_high),
            surrogate=Stage(clipped_surrogate, "ratio", "advantage", "bounds", dual_clip=self.dual_clip),
            penalty=self.kl(),
            reduce=token_mean,
        )


def share_advantage(
    entropy: Float[Tensor, "B T"],
    reward: Float[Tensor, "B *t"],
    verdict: Float[Tensor, "B *t"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    base: float = 1.0,
    bonus: float = 0.1,
    threshold: float = 0.5,
    normalisation: Literal["padded", "own", "joint"] = "padded",
    singleton: Singleton = "zero",
    level: Literal["token", "response"] = "token",
) -> Float[Tensor, "B T"]:
    """Advantages from rewards shaped by shares of entropy, apart for verdicts above and below the threshold.

    `level="response"` (GRPO-S): of the responses' mean entropies, the same number on every token of a response. A
    response without tokens has no entropy, and is not part of its group. Reward and verdict may be (B,T), returns
    at each position: tokens are then right or wrong by themselves; with `level="response"` each column is compared
    by itself, and a NaN is not part of it.
    """
    dtype, shape = entropy.dtype, mask.shape
    if level == "response":
        entropy, mask = mean_entropy(entropy, mask).unsqueeze(1).to(dtype), mask.any(-1, keepdim=True)
        if verdict.ndim == 2:  # a response at a position as a row, in a group of that position
            (b, t), (index, _) = verdict.shape, group_index(group)
            group = (index.unsqueeze(1) * t + torch.arange(t, device=index.device)).flatten()
            entropy, mask = entropy.expand(b, t).reshape(-1, 1), (mask & ~verdict.isnan()).view(-1, 1)
            reward, verdict = reward.flatten(), verdict.flatten()
    correct = verdict > threshold
    shaped = entropy_shaped_reward(entropy, correct, group, mask, base, bonus)
    advantage = signed_advantage(shaped, correct, group, mask, normalisation)
    single = alone(group, mask.any(-1)).unsqueeze(1)
    lone = columns(reward).double() / (1 + STD_EPS) if singleton == "reward" else 0.0
    advantage = torch.where(single & mask, lone, advantage)
    advantage = advantage.to(dtype)
    return advantage.expand(shape) if len(advantage) == shape[0] else advantage.view(shape)
