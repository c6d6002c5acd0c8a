"""Temperature rules for decoding that need no statistics: no training method takes them.

Entropies are in nats, of softmax(logits / T_base) over the full vocabulary; a rule is a factor on T_base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..batch import EntropyStats
from ..methods._options import check_numbers, require


@dataclass(frozen=True, kw_only=True)
class DynamicTemperature:
    """1 + tau (2 (H / ln V)^exponent - 1): from 1 - tau to 1 + tau, the dynamic temperature of llama.cpp.

    There it is the range T - delta to T + delta; delta is tau T_base here.

    Raises:
        ValueError: a value is out of its range, named in the message.
    """

    rule: Literal["dynatemp"] = "dynatemp"
    tau: float = 0.1
    """Strength, below 1."""
    vocabulary: int | None = None
    """V, the number of tokens, which has no default."""
    exponent: float = 1.0
    """Power of the normalised entropy."""

    needs_stats: ClassVar[bool] = False

    @property
    def acts(self) -> bool:
        """Whether any temperature differs from T_base."""
        return self.tau > 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_numbers(self)
        fits = isinstance(self.vocabulary, int) and self.vocabulary > 1
        require(fits, "vocabulary", self.vocabulary, "a whole number > 1 with the rule 'dynatemp'")
        require(0 < self.exponent < math.inf, "exponent", self.exponent, "> 0 and finite")
        require(0 <= self.tau < 1, "tau", self.tau, "in [0, 1), so that every temperature is positive")

    def factor(self, entropy: Float[Tensor, "*shape"], stats: EntropyStats | None = None) -> Tensor:
        """Factor on T_base at positions with these entropies; reads no statistics."""
        share = (entropy / math.log(self.vocabulary or 0)).clamp(0.0, 1.0)
        return (1.0 + self.tau * (2.0 * share.pow(self.exponent) - 1.0)).to(torch.float32)


@dataclass(frozen=True, kw_only=True)
class EDT:
    """max(0.8^(theta / H), t_min): towards 1 where the policy is uncertain (EDT, arXiv 2403.14541).

    The floor is ours: at H = 0 the paper's temperature is 0.

    Raises:
        ValueError: a value is out of its range, named in the message.
    """

    rule: Literal["edt"] = "edt"
    theta: float = 0.1
    """Strength, nats; 0 changes nothing."""
    t_min: float = 0.1
    """Lower clamp, as a factor on T_base (ours)."""

    BASE: ClassVar[float] = 0.8
    needs_stats: ClassVar[bool] = False

    @property
    def acts(self) -> bool:
        """Whether any temperature differs from T_base."""
        return self.theta > 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_numbers(self)
        require(0 <= self.theta < math.inf, "theta", self.theta, ">= 0 and finite")
        require(0 < self.t_min <= 1, "t_min", self.t_min, "in (0, 1]: a temperature must stay positive")

    def factor(self, entropy: Float[Tensor, "*shape"], stats: EntropyStats | None = None) -> Tensor:
        """Factor on T_base at positions with these entropies; reads no statistics."""
        return torch.pow(self.BASE, self.theta / entropy.clamp_min(1e-8)).clamp_min(self.t_min).to(torch.float32)
