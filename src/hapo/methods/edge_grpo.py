"""EDGE-GRPO: entropy-driven advantage (arXiv 2507.21848)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..method import Method
from ..parts.advantage import Singleton, group_advantage
from ..parts.bounds import constant_bounds
from ..parts.reduce import sequence_mean
from ..parts.shaping import relative_entropy
from ..parts.surrogate import clipped_surrogate
from ..stage import Stage
from ._options import ClippedOptions, Paper, one_of, pair, require
from ._registry import register


@register("edge_grpo")
@dataclass(frozen=True, kw_only=True)
class EDGEGRPO(ClippedOptions):
    """EDGE-GRPO's entropy-driven advantage: A divided by the response's mean entropy relative to its group.

    A'_i = A_i / Phat_i, Phat_i = P_i / mean_j P_j, P_i the mean entropy of the response's tokens at rollout;
    then GRPO's loss. Confident right answers gain, confident wrong answers lose more. Constant for autograd:
    everything but the ratio (the authors' code lets a gradient through P). Guided error correction, which
    rewrites wrong samples before training, is the trainer's work and is not here.

    `variant="release"` takes the authors' P: a sum of entropies instead of a mean (they divide by the padded
    width, which cancels), relative to the whole batch instead of the group.
    """

    paper: ClassVar = Paper(
        "EDGE-GRPO: Entropy-Driven GRPO with Guided Error Correction for Advantage Diversity", "2507.21848", 2025
    )
    summary: ClassVar = "group advantage divided by the response's relative entropy"

    clamp: Sequence[float] | None = None
    """Range of Phat; off (release: a disabled clamp to [0.1, 10]). Without it a response of entropy near 0
    gets a very large advantage."""
    variant: Literal["paper", "release"] = "paper"
    """The paper's definition of P, or what the authors' code computes."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        one_of("variant", self.variant, ("paper", "release"))
        if self.clamp is not None:
            clamp: Any = pair("clamp", self.clamp, "a pair (low, high), or None")
            require(0 < clamp[0] <= 1 <= clamp[1], "clamp", self.clamp, "0 < low <= 1 <= high")
            object.__setattr__(self, "clamp", clamp)

    def build(self) -> Method:
        """The method with these options."""
        options = {"variant": self.variant, "clamp": self.clamp, "singleton": self.singleton}
        return Method(
            **self.shared(),
            advantage=Stage(entropy_driven_advantage, self.earned, "old_entropy", "group", "mask", **options),
            bounds=Stage(constant_bounds, "ratio", low=self.eps_low, high=self.eps_high),
            surrogate=Stage(clipped_surrogate, "ratio", "advantage", "bounds", dual_clip=self.dual_clip),
            penalty=self.kl(),
            reduce=sequence_mean,
        )


def entropy_driven_advantage(
    reward: Float[Tensor, "B *t"],
    entropy: Float[Tensor, "B T"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    variant: Literal["paper", "release"] = "paper",
    clamp: tuple[float, float] | None = None,
    singleton: Singleton = "zero",
) -> Float[Tensor, "B T"]:
    """A_i / Phat_i: the group's z-score over the response's relative entropy, clamped where `clamp` says."""
    advantage = group_advantage(reward, group, mask, singleton=singleton)
    relative = relative_entropy(entropy, group, mask, variant)
    if clamp is not None:
        relative = relative.clamp(*clamp)
    return (advantage / relative).to(advantage.dtype)
