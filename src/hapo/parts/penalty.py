"""Penalties that are added to the surrogate: estimates of KL(policy || reference) from the taken tokens.

Shapes: B sequences, T tokens. Nats. Differentiable in `logp` alone; log-ratios are clamped to +-20, without a
gradient beyond. k1, k2 and k3 are the estimators of joschu.net/blog/kl-approx.html; k3 is GRPO's (arXiv
2402.03300, eq. 4) and verl's low_var_kl, k2 verl's mse, k1 its kl.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .ratio import LOG_RATIO_LIMIT


def k1(logp: Float[Tensor, "B #T"], ref_logp: Float[Tensor, "B #T"]) -> Float[Tensor, "B #T"]:
    """logp - ref: unbiased, of both signs. Its gradient is 1, which says nothing of the reference."""
    return -_log_ratio(logp, ref_logp)


def k2(logp: Float[Tensor, "B #T"], ref_logp: Float[Tensor, "B #T"]) -> Float[Tensor, "B #T"]:
    """(logp - ref)^2 / 2, >= 0. Its gradient is logp - ref, that of the KL itself on average over the policy."""
    return _log_ratio(logp, ref_logp).square() / 2


def k3(logp: Float[Tensor, "B #T"], ref_logp: Float[Tensor, "B #T"]) -> Float[Tensor, "B #T"]:
    """exp(d) - d - 1 with d = ref - logp, >= 0: unbiased, of small variance. Its gradient is 1 - exp(d)."""
    d = _log_ratio(logp, ref_logp)
    return d.exp() - d - 1.0


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def kl_penalty(
    logp: Float[Tensor, "B T"],
    ref_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    coef: float | Float[Tensor, "B T"] = 1.0,
    estimator: Literal["k1", "k2", "k3"] = "k3",
    level: Literal["token", "sequence"] = "token",
) -> Float[Tensor, "B T"]:
    """coef times the estimate of each token, or of each whole response.

    `level="sequence"`: the estimate of sum_t logp against sum_t ref, the same number on every valid token of the
    response, as a sequence's ratio is; the mean of per-response means then counts each response once.
    """
    estimate = ESTIMATORS[estimator]
    if level == "token":
        return coef * estimate(logp, ref_logp)
    sums = [torch.where(mask, x, 0.0).sum(-1, keepdim=True) for x in (logp, ref_logp)]
    return coef * estimate(*sums).expand_as(logp)


def unbiased_kl_penalty(
    ratio: Float[Tensor, "B T"],
    logp: Float[Tensor, "B T"],
    ref_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    coef: float = 1.0,
) -> Float[Tensor, "B T"]:
    """ratio times `kl_penalty`, differentiable in both: tokens of the old policy, weighed as those of the current.

    "Unbiased KL estimate" of DeepSeek-V3.2 (arXiv 2512.02556); TRL's `use_bias_correction_kl`.
    """
    return ratio * kl_penalty(logp, ref_logp, mask, coef)


def gated_kl(
    logp: Float[Tensor, "B T"],
    ref_logp: Float[Tensor, "B T"],
    gate: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    inside: float,
    outside: float,
    apart: bool = False,
) -> Float[Tensor, "B T"]:
    """k3, weighed `inside` where the gate is positive, `outside` elsewhere (Archer, arXiv 2507.15778, eq. 5).

    `apart`: a mean over the gated and one over the other tokens of these rows, instead of one over all, which
    multiplies the weights by N / N_gated and N / N_other (the authors' code).
    """
    gated = gate > 0
    coef = torch.full_like(gate, outside).masked_fill(gated, inside)
    if apart:
        n, inner = mask.sum(), (mask & gated).sum()
        coef = coef * n / torch.where(gated, inner, n - inner).clamp_min(1)
    return kl_penalty(logp, ref_logp, mask, coef)


def _log_ratio(logp: Tensor, ref_logp: Tensor) -> Tensor:
    return (ref_logp.detach() - logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
