"""RankTuner: probability-entropy calibrated token weights (arXiv 2602.01745)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..parts.rank import approx_weight, exact_weight
from ..stage import Stage
from ..supervised import Supervised
from ._options import Paper, SupervisedOptions, one_of, require
from ._registry import register


@register("ranktuner")
@dataclass(frozen=True, kw_only=True)
class RankTuner(SupervisedOptions):
    """RankTuner: each target weighs the more, the further its rank is behind the one that the model expects there.

    L = -sum_t m w logp / N, w = w0 S, N the valid targets of the optimiser step; w as a whole is a constant for
    autograd. With R the target's rank (ties count against it), E = sum_i i P_(i) the expected rank, H the entropy
    in bits and f(x) = 1 / log2(x + 1):

        exact:  S = 2^(f(E) - f(R))
        approx: S = (p s)^-K,  s = 2^H / 4 + 1,  K = log2(max(R, s) + 1)^-2

    Reconstructed, where the summaries that were read are silent: the divisor N, the stop-gradient on all of w, and
    s below 2 bits, where it is the same formula. The authors' code could not be had.

    Raises:
        ValueError: an estimator or a base weight that there is not.
    """

    paper: ClassVar = Paper(
        "Probability-Entropy Calibration: An Elastic Indicator for Adaptive Fine-tuning", "2602.01745", 2026
    )
    summary: ClassVar = "weights by the target's rank against the rank that the model expects there"

    estimator: Literal["approx", "exact"] = "approx"
    """The scale S: from the entropy, as training is said to do, or from the expected rank, which sorts the
    vocabulary at every target."""
    base_weight: Literal["p", 1] = "p"
    """w0: the target's probability (the paper's choice for mathematics), or 1 (for other tasks)."""

    def __post_init__(self) -> None:
        """Check the choices."""
        one_of("estimator", self.estimator, ("approx", "exact"))
        known = self.base_weight in ("p", 1) and not isinstance(self.base_weight, bool)
        require(known, "base_weight", self.base_weight, "'p' or the number 1")

    def build(self) -> Supervised:
        """The method with these options."""
        power = 1.0 if self.base_weight == "p" else 0.0
        if self.estimator == "exact":
            weight = Stage(exact_weight, "logp", "rank", "expected_rank", power=power)
        else:
            weight = Stage(approx_weight, "logp", "rank", "entropy", power=power)
        return Supervised(name=self.name, weight=weight)
