"""EDGE-GRPO: entropy-driven advantage (arXiv 2507.21848)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..batch import TokenBatch
from ..method import Method
from ..parts.reduce import sequence_mean, token_mean
from ..parts.shaping import relative_entropy
from ._options import ClippedOptions, Paper, entropy_of, one_of, pair, require
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
    stages: ClassVar = {
        "advantage": "group z-score / relative entropy of the response",
        "bounds": "0.8 to 1.2",
        "surrogate": "clipped",
        "reduce": "sequence mean of token means",
    }

    clamp: Sequence[float] | None = None
    """Range of Phat; off (release: a disabled clamp to [0.1, 10]). Without it a response of entropy near 0
    gets a very large advantage."""
    reduction: Literal["sequence_mean", "token_mean"] = "sequence_mean"
    """Mean of per-response means (the paper's GRPO objective), or one mean over all tokens (release, per local
    batch there)."""
    variant: Literal["paper", "release"] = "paper"
    """The paper's definition of P, or what the authors' code computes."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        one_of("variant", self.variant, ("paper", "release"))
        one_of("reduction", self.reduction, ("sequence_mean", "token_mean"))
        if self.clamp is not None:
            clamp: Any = pair("clamp", self.clamp, "a pair (low, high), or None")
            require(0 < clamp[0] <= 1 <= clamp[1], "clamp", self.clamp, "0 < low <= 1 <= high")
            object.__setattr__(self, "clamp", clamp)

    def build(self) -> Method:
        """The method with these options."""
        reduce = sequence_mean if self.reduction == "sequence_mean" else token_mean
        return super().build().replace(reduce=reduce)

    def _advantage(self, batch: TokenBatch) -> Tensor:
        advantage = super()._advantage(batch)
        entropy = entropy_of(batch, "old")
        relative = relative_entropy(entropy, batch.group, batch.mask, self.variant)
        if self.clamp is not None:
            relative = relative.clamp(*self.clamp)
        return (advantage / relative).to(advantage.dtype)
