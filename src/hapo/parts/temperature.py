"""Sampling temperature as a function of the entropy: T = T_base x factor.

Entropies are in nats, of softmax(logits / T_base) over the full vocabulary. HAPO's two laws read statistics of a
rollout batch; the other two are rules for decoding that need none.
"""

from __future__ import annotations

import math
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


def dynatemp_factor(
    entropy: Float[Tensor, "*shape"], vocabulary: int, tau: float, exponent: float = 1.0
) -> Float[Tensor, "*shape"]:
    """1 + tau (2 (H / ln V)^exponent - 1): from 1 - tau to 1 + tau, the dynamic temperature of llama.cpp.

    There it is the range T - delta to T + delta; delta is tau T_base here. V is the size of the vocabulary.
    """
    share = (entropy / math.log(vocabulary)).clamp(0.0, 1.0)
    return (1.0 + tau * (2.0 * share.pow(exponent) - 1.0)).to(torch.float32)


def edt_factor(
    entropy: Float[Tensor, "*shape"], theta: float, base: float = 0.8, low: float = 0.1
) -> Float[Tensor, "*shape"]:
    """base^(theta / H), at least `low`: towards 1 where the policy is uncertain (EDT, arXiv 2403.14541).

    The floor is ours: at H = 0 the paper's temperature is 0.
    """
    return torch.pow(base, theta / entropy.clamp_min(1e-8)).clamp_min(low).to(torch.float32)
