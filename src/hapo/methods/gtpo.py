"""GTPO: token-level reward shaping with policy entropy (arXiv 2508.04349)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..batch import TokenBatch
from ..parts.advantage import STD_EPS, signed_advantage
from ..parts.groups import alone
from ..parts.shaping import entropy_shaped_reward
from ._options import ClippedOptions, Paper, entropy_of, one_of, pair, require
from ._registry import register

PAPER = Paper("GTPO and GRPO-S: Token and Sequence-Level Reward Shaping with Policy Entropy", "2508.04349", 2025)


@dataclass(frozen=True, kw_only=True)
class EntropyShaped(ClippedOptions):
    """What GTPO and GRPO-S share: right and wrong responses are shaped, and normalised, apart."""

    eps_high: float = 0.28
    """Upper clip range; the paper's numbers 0.2 and 0.28, read as DAPO's ratio clip."""
    scope: Literal["group", "batch"] = "group"
    """Compare the responses to one prompt (the equations), or the whole batch (the paper's discussion)."""
    entropy_clip: Sequence[float] | None = None
    """Clamp of token entropies, nats, before shaping; (0.2, 0.28) is another reading of the paper's numbers."""
    threshold: float = 0.5
    """A response is right where its verdict is above this."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        one_of("scope", self.scope, ("group", "batch"))
        if self.entropy_clip is not None:
            clip: Any = pair("entropy_clip", self.entropy_clip, "a pair (low, high) in nats, or None")
            require(0 <= clip[0] <= clip[1], "entropy_clip", self.entropy_clip, "0 <= low <= high")
            object.__setattr__(self, "entropy_clip", clip)

    def _entropy(self, batch: TokenBatch) -> Tensor:
        entropy = entropy_of(batch, "old")
        return entropy if self.entropy_clip is None else entropy.clamp(*self.entropy_clip)

    def _shaped(
        self,
        batch: TokenBatch,
        entropy: Tensor,
        mask: Tensor,
        base: float,
        bonus: float,
        normalisation: Literal["padded", "own", "joint"],
    ) -> Tensor:
        """Advantages from the shaped rewards of these entropies, per token, or per response where T is 1."""
        correct = (batch.reward if batch.verdict is None else batch.verdict) > self.threshold
        group = batch.group if self.scope == "group" else torch.zeros_like(batch.group)
        shaped = entropy_shaped_reward(entropy, correct, group, mask, base, bonus)
        advantage = signed_advantage(shaped, correct, group, mask, normalisation)
        if self.singleton == "reward":
            single = alone(batch.group, mask.any(-1)).unsqueeze(1)
            advantage = torch.where(single & mask, batch.reward.unsqueeze(1).double() / (1 + STD_EPS), advantage)
        return advantage.to(batch.old_logp.dtype)


@register("gtpo")
@dataclass(frozen=True, kw_only=True)
class GTPO(EntropyShaped):
    """GTPO: each token's reward is shaped by its share of the entropy at its position, then normalised per sign.

    Right responses: r = alpha1 + alpha2 d_t H_it / sum_k H_kt over the d_t right responses alive at t. Wrong
    ones: r = -alpha1 - alpha2 h_t u_jt / sum_k u_kt, u = 1/H. A is the z-score of r, apart for right and wrong
    (`normalisation`), in a token mean of the clipped surrogate, eq. 7. Entropies are those at rollout. Constant
    for autograd: everything but the ratio. A group of right answers only has advantages too, unless
    `filter_groups` drops it.

    Not to be confused with another paper's GTPO, arXiv 2508.03772. No code of the authors is public.
    """

    paper: ClassVar = PAPER
    summary: ClassVar = "token rewards by the share of entropy at each position (arXiv 2508.04349, not 2508.03772)"
    stages: ClassVar = {
        "advantage": "z-score of entropy-shaped token rewards, per sign",
        "bounds": "0.8 to 1.28",
        "surrogate": "clipped",
        "reduce": "token mean",
    }

    alpha1: float = 1.0
    """Weight of the outcome (paper)."""
    alpha2: float = 0.1
    """Weight of the entropy share (paper)."""
    normalisation: Literal["padded", "own"] = "padded"
    """The set that normalises right (wrong) tokens: all tokens of the group, 0 for those of the other sign, or
    the own sign's only. The paper's wording allows both; only the first keeps right tokens above 0."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("alpha1", "alpha2"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        one_of("normalisation", self.normalisation, ("padded", "own"))

    def _advantage(self, batch: TokenBatch) -> Tensor:
        entropy = self._entropy(batch)
        return self._shaped(batch, entropy, batch.mask, self.alpha1, self.alpha2, self.normalisation)
