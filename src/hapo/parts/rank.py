"""Ranks of the targets, and the weights that compare them with what the distribution expects (RankTuner).

Shapes: B sequences, T tokens, V vocabulary. Ranks begin at 1, the likeliest token. Scoring makes the ranks without
the logits (`hapo.scoring`); the functions here that take logits hold them all, for tests and small vocabularies.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def target_rank(logits: Float[Tensor, "*shape V"], targets: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """R = #{v : P_v >= P_target}: 1 is the best, and ties count against the target."""
    return (logits >= logits.gather(-1, targets.unsqueeze(-1))).sum(-1).to(logits.dtype)


def expected_rank(logits: Float[Tensor, "*shape V"]) -> Float[Tensor, "*shape"]:
    """E = sum_i i P_(i), P in decreasing order: 1 where one token is certain, (V + 1) / 2 where all are equal."""
    p = logits.softmax(-1).sort(-1, descending=True).values
    return p @ torch.arange(1, p.shape[-1] + 1, dtype=p.dtype, device=p.device)


def exact_weight(
    logp: Float[Tensor, "B T"],
    rank: Float[Tensor, "B T"],
    expected_rank: Float[Tensor, "B T"],
    power: float = 1.0,
) -> Float[Tensor, "B T"]:
    """p^power 2^(f(E) - f(R)), f(x) = 1 / log2(x + 1): the scale lies in (0.5, 2), and is 1 where R = E."""
    scale = torch.exp2(1 / torch.log2(expected_rank + 1) - 1 / torch.log2(rank + 1))
    return scale if power == 0 else torch.exp(power * logp) * scale


def approx_weight(
    logp: Float[Tensor, "B T"],
    rank: Float[Tensor, "B T"],
    entropy: Float[Tensor, "B T"],
    power: float = 1.0,
) -> Float[Tensor, "B T"]:
    """p^power (p s)^-K, s = 2^H / 4 + 1 with H in bits, K = log2(xi + 1)^-2, xi = max(R, s).

    The entropy comes in nats, as everywhere. One exponential makes the weight, so that a p that underflows gives 0
    and not 0 times inf.
    """
    s = torch.exp2(entropy / math.log(2.0)) / 4 + 1
    k = torch.log2(torch.maximum(rank, s) + 1).pow(-2)
    return torch.exp((power - k) * logp - k * torch.log(s))
