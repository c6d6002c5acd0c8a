"""Penalties that are added to the surrogate."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from .ratio import LOG_RATIO_LIMIT


def k3(logp: Float[Tensor, "B T"], ref_logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """exp(d) - d - 1 with d = ref - logp: the k3 estimate of KL(policy || reference), nats, >= 0.

    GRPO, arXiv 2402.03300, eq. 4. Differentiable in logp: the gradient is 1 - exp(d). d is clamped to +-20.
    """
    d = (ref_logp.detach() - logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return d.exp() - d - 1.0
