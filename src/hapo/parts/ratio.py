"""Importance ratios between the current policy, the rollout policy and the sampler."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to this on both sides: a numerical guard only."""


LOG_SEQUENCE_RATIO_LIMIT = 10.0
"""Upper clamp of a sequence's mean log-ratio (verl's guard)."""


def token_ratio(logp: Float[Tensor, "B T"], old_logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """r_it = exp(clamp(logp - old_logp, -20, 20)); differentiable in logp only, with no gradient in the clamp."""
    return (logp - old_logp.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def sequence_ratio(
    logp: Float[Tensor, "B T"],
    old_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    form: Literal["sequence", "token"] = "sequence",
) -> Float[Tensor, "B T"]:
    """s_i = exp((1/n_i) sum_t m (logp - old_logp)), the geometric mean of token ratios (GSPO, arXiv 2507.18071).

    The same number at every valid token of a response. `form="sequence"`: a token's gradient is that of s_i,
    s_i / n_i for each valid token. `form="token"` is GSPO-token, sg(s_i) exp(logp - sg(logp)): each
    token has its own gradient, so that weights may differ within a response; summed over a response both agree
    wherever the weights do not differ. log s_i is clamped to 10 from above, without a gradient beyond; 1 for a row
    without valid tokens.
    """
    n = mask.sum(-1, keepdim=True).clamp_min(1)
    difference = (logp - old_logp.detach()) * mask
    mean = difference.sum(-1, keepdim=True) / n
    if form == "token":
        mean = mean.detach() + (logp - logp.detach())
    return mean.clamp(max=LOG_SEQUENCE_RATIO_LIMIT).exp().expand_as(logp)


def mean_ratio(
    logp: Float[Tensor, "B T"], old_logp: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """w_i = (1/n_i) sum_t m r_it, the arithmetic mean of token ratios (GRPO-S, arXiv 2508.04349, eq. 11).

    The same number at every token of a response, differentiable in logp; 0 for a row without valid tokens.
    """
    n = mask.sum(-1, keepdim=True).clamp_min(1)
    return ((token_ratio(logp, old_logp) * mask).sum(-1, keepdim=True) / n).expand_as(logp)


def truncated_correction(
    old_logp: Float[Tensor, "B T"], sampler_logp: Float[Tensor, "B T"], cap: float = 2.0
) -> Float[Tensor, "B T"]:
    """min(exp(old - sampler), cap): corrects for tokens drawn from another distribution than the old policy.

    The sampler's distribution holds the adaptive temperature and any truncation (hapo.md, part A). Detached.
    """
    return token_ratio(old_logp.detach(), sampler_logp).clamp(max=cap)
