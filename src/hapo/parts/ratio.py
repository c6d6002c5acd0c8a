"""Importance ratios between the current policy, the rollout policy and the sampler."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to this on both sides: a numerical guard only."""


def token_ratio(logp: Float[Tensor, "B T"], old_logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """r_it = exp(clamp(logp - old_logp, -20, 20)); differentiable in logp only."""
    return (logp - old_logp.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def truncated_correction(
    old_logp: Float[Tensor, "B T"], sampler_logp: Float[Tensor, "B T"], cap: float = 2.0
) -> Float[Tensor, "B T"]:
    """min(exp(old - sampler), cap): corrects for tokens drawn from another distribution than the old policy.

    The sampler's distribution holds the adaptive temperature and any truncation (hapo.md, part A). Detached.
    """
    return token_ratio(old_logp.detach(), sampler_logp).clamp(max=cap)
