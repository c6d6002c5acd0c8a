"""VESPO: variational sequence-level soft policy optimisation (arXiv 2602.10693)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..method import Method
from ..parts.bounds import no_bounds
from ..parts.ratio import LOG_RATIO_LIMIT
from ..parts.reduce import token_mean
from ..parts.surrogate import Surrogate
from ..stage import Stage
from ._options import GroupOptions, Paper, require
from ._registry import register

LEAST_LOG_WEIGHT = math.log(1e-8)
"""Lower clamp of a response's log importance weight (the authors' guard)."""


KERNEL = ("k_pos", "lambda_pos", "k_neg", "lambda_neg")


@register("vespo")
@dataclass(frozen=True, kw_only=True)
class VESPO(GroupOptions):
    """VESPO: a response's own importance weight w, no mean over its tokens, acts through a soft kernel phi(w).

    L = (1/N) sum_it -sg(phi(w_i)) A_i logp_it, phi(w) = w^k exp(lambda (1 - w)), w_i = exp(sum_t (logp - mu)),
    k and lambda by the sign of A. mu is `sampler_logp` where it is known, else `old_logp`: w holds the sampler's
    correction, so no other is made (`sampler_cap`). phi(1) = 1; phi falls to 0 on both sides of its peak at
    w = k / lambda. Constant for autograd: advantages and phi. The value of the loss holds log-probs; read its
    gradient, -phi A / N.

    Raises:
        ValueError: an exponent or a decay is negative or not finite, or `sampler_cap` is set.
    """

    paper: ClassVar = Paper(
        "VESPO: Variational Sequence-Level Soft Policy Optimization for Stable Off-Policy LLM Training",
        "2602.10693",
        2026,
    )
    summary: ClassVar = "the response's whole importance weight through a soft kernel, in the place of the clip"

    k_pos: float = 2.0
    """Exponent of w where A >= 0 (paper, section 3.4)."""
    lambda_pos: float = 3.0
    """Decay in w where A >= 0 (paper)."""
    k_neg: float = 3.0
    """Exponent of w where A < 0 (paper)."""
    lambda_neg: float = 2.0
    """Decay in w where A < 0 (paper)."""
    sampler_cap: float | None = None
    """None: w is the weight against what drew the tokens already."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in KERNEL:
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), ">= 0 and finite")
        require(self.sampler_cap is None, "sampler_cap", self.sampler_cap, "None: w corrects for the sampler")

    def build(self) -> Method:
        """The method with these options."""
        kernel: dict[str, Any] = {name: getattr(self, name) for name in KERNEL}
        return Method(
            **self.shared(),
            advantage=self.group_advantage(),
            bounds=Stage(no_bounds, "ratio"),
            surrogate=Stage(gamma_kernel, "logp", "drawn_logp", "advantage", "mask", **kernel),
            penalty=self.kl(),
            reduce=token_mean,
            breaks=frozenset({"detach"}),
        )


def gamma_kernel(
    logp: Float[Tensor, "B T"],
    drawn_logp: Float[Tensor, "B T"],
    advantage: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
) -> Surrogate:
    """-sg(phi(w)) A logp, phi(w) = w^k exp(lambda (1 - w)), w the product of the response's token ratios.

    log w is held to [log 1e-8, 20], each token's log-ratio to 20 on both sides: numerical guards only. No token
    counts as clipped.
    """
    log_ratio = (logp.detach() - drawn_logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    log_w = torch.where(mask, log_ratio, 0.0).sum(-1, keepdim=True).clamp(LEAST_LOG_WEIGHT, LOG_RATIO_LIMIT)
    negative = advantage < 0
    k = torch.full_like(advantage, k_pos).masked_fill(negative, k_neg)
    decay = torch.full_like(advantage, lambda_pos).masked_fill(negative, lambda_neg)
    phi = (k * log_w + decay * (1.0 - log_w.exp())).exp()
    nowhere = torch.zeros_like(mask)
    return Surrogate(-phi * advantage * logp, nowhere, nowhere)
