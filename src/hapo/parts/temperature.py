"""Sampling temperature as a function of the entropy: T = T_base x factor.

Entropies are in nats, of softmax(logits / T_base) over the full vocabulary. Both read statistics of a rollout
batch; rules for decoding that need none are in `hapo.samplers.decoding_rules`.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .entropy import EntropyStats, entropy_signal, log_entropy


def bounded_factor(
    entropy: Float[Tensor, "*shape"],
    stats: EntropyStats,
    tau: float,
    variant: Literal["paper", "release"] = "paper",
) -> Float[Tensor, "*shape"]:
    """1 + tau clip(h, -1, 1): the bounded form, positive for every entropy when 0 <= tau < 1."""
    return 1.0 + tau * entropy_signal(entropy, stats, variant).clamp(-1.0, 1.0)


def zscore_factor(
    entropy: Float[Tensor, "*shape"],
    stats: EntropyStats,
    tau: float,
    low: float = 0.1,
    high: float = 2.0,
) -> Float[Tensor, "*shape"]:
    """1 + tau (log H - pivot) / sigma, clamped to [low, high]: the paper's eq. 8.

    The paper states no clamp; without one a fully certain position can get a negative temperature.
    """
    z = (log_entropy(entropy).double() - stats.pivot) / max(stats.sigma, 1e-8)
    return (1.0 + tau * z).clamp(low, high).to(torch.float32)
