"""Entropy of tokens and the signal that HAPO makes of it.

Shapes: B sequences, T tokens, V vocabulary. Entropies are in nats, of the full-vocabulary policy
softmax(logits / T_base), before top-p, top-k and the adaptive factor.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..batch import EntropyStats as EntropyStats
from ..batch import valid, working_dtype

LOG_FLOOR = 1e-8
"""Entropies below this are floored before the logarithm (hapo.md, eqs. 5-7)."""

SCALE_FLOOR = 1e-8

LN2 = math.log(2.0)

CHUNK = 1 << 19
"""Numbers that are worked on at once: 2 MiB of float32, near the size of a core's L2 cache."""


def entropy_from_logits(
    logits: Float[Tensor, "*shape V"], t_base: float | Float[Tensor, "*shape"] = 1.0
) -> Float[Tensor, "*shape"]:
    """Entropy in nats of softmax(logits / t_base), float32 (float64 stays), as logsumexp(z) - sum p z.

    Logits of -inf (masked vocabulary) count as probability 0. Rows are shifted by their maximum, so the
    result is exact to about 1e-6 for any offset. `t_base` is one number, or one a row. Works row by row in
    chunks, so that no copy of all logits is made. For sampling: logits that need a gradient are refused
    (`hapo.scoring` has the differentiable entropy).
    """
    return entropy_and_normaliser(logits, t_base)[0]


def entropy_and_normaliser(
    logits: Float[Tensor, "*shape V"], t_base: float | Float[Tensor, "*shape"] = 1.0
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """`entropy_from_logits`, and logsumexp(logits / t_base) from the same pass."""
    rows = logits.flatten(0, -2) if logits.ndim > 1 else logits.unsqueeze(0)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    t = t_base if isinstance(t_base, Tensor) else torch.full((), t_base, device=logits.device)
    t = t.to(dtype).expand(logits.shape[:-1]).reshape(-1, 1)
    chunk = _chunk(logits)
    step = min(max(1, chunk // max(rows.shape[-1], 1)), len(rows))
    # Two buffers for all chunks: memory freed and taken anew at each chunk costs as much as the arithmetic.
    buffer = torch.empty(2, step, rows.shape[-1], dtype=dtype, device=logits.device)
    parts = [_entropy(x, s, *buffer[:, : len(x)]) for x, s in zip(rows.split(step), t.split(step), strict=True)]
    entropy, normaliser = (torch.cat(of).reshape(logits.shape[:-1]) for of in zip(*parts, strict=True))
    return entropy, normaliser


def _chunk(x: Tensor) -> int:
    """Numbers to work on at once; an accelerator wants large launches."""
    return CHUNK if x.device.type == "cpu" else 64 * CHUNK


def _entropy(
    logits: Float[Tensor, "n V"],
    t_base: Float[Tensor, "n 1"],
    z: Float[Tensor, "n V"],
    e: Float[Tensor, "n V"],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """One chunk: entropy and logsumexp; z and e are overwritten."""
    # The maximum goes before T_base, so that an offset of all logits costs no digits. z is in units of ln 2: exp2
    # costs a third of exp on a CPU. 2**-1100 is 0 in every dtype: the floor keeps 0 * -inf out of the sum.
    largest = logits.amax(-1, keepdim=True)
    torch.sub(logits.to(z.dtype), largest, out=z)
    z.mul_(1 / (LN2 * t_base)).clamp_min_(-1100.0)
    total = torch.exp2(z, out=e).sum(-1)
    log_total = total.log()
    entropy = (log_total - LN2 * z.mul_(e).sum(-1) / total).clamp_min(0.0)
    return entropy, log_total + (largest / t_base).squeeze(-1)


def masked_quantile(x: Float[Tensor, "*b n"], mask: Bool[Tensor, "*b n"], level: float) -> Float[Tensor, "*b 1"]:
    """Quantile of the valid entries of each row, linear between order statistics; float64, NaN for none.

    Where level (n - 1) is an integer the result is that order statistic itself.
    """
    n = mask.sum(-1, keepdim=True)
    ordered = torch.where(mask, x.double(), torch.inf).sort(-1).values
    position = level * (n - 1).clamp_min(0).double()
    nearest = position.round()
    position = torch.where((position - nearest).abs() < 1e-9, nearest, position)
    if x.shape[-1] == 0:
        return torch.full_like(position, torch.nan)
    below, above = position.floor().long(), position.ceil().long()
    low, high = ordered.gather(-1, below), ordered.gather(-1, above)
    fraction = position - position.floor()
    value = torch.where(fraction > 0, low + fraction * (high - low), low)
    return torch.where(n > 0, value, torch.nan)


def above_quantile(
    entropy: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], level: float, strict: bool = False
) -> Float[Tensor, "B T"]:
    """1 where the entropy is at or above the quantile of its response's entropies, 0 elsewhere; `strict`: above.

    The quantile is `masked_quantile`'s, linear.
    """
    threshold = masked_quantile(entropy, mask, level)
    return ((entropy > threshold) if strict else (entropy >= threshold)).to(entropy.dtype)


def mean_entropy(entropy: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Mean entropy of the valid tokens of each response, nats, float64; 0 for a row without valid tokens."""
    total = torch.where(mask, entropy.detach().double(), 0.0).sum(-1)
    return total / mask.sum(-1).clamp_min(1)


def log_entropy(entropy: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(max(H, 1e-8)), float32 (float64 stays)."""
    return entropy.to(working_dtype(entropy)).clamp_min(LOG_FLOOR).log_()


def entropy_stats(
    entropy: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], rho: float = 0.8
) -> EntropyStats | None:
    """Statistics of log H over the valid tokens (HAPO, eqs. 5-7); None where no token is valid.

    The pivot is the nearest-rank quantile: the sorted value at round(rho (N - 1)), halves to the even index,
    so it is an actual token. sigma divides by N.
    """
    h = valid(entropy, mask)
    n = h.numel()
    if n == 0:
        return None
    log_h = log_entropy(h)
    low, high = log_h.aminmax()
    pivot, low, high = torch.stack([_ranked(log_h, round(rho * (n - 1))), low, high]).double().tolist()
    return EntropyStats(
        pivot=pivot,
        sigma=_deviation(log_h),
        h_max=max(high - pivot, 0.0),
        h_min=min(low - pivot, 0.0),
        tokens=n,
        floored=int((h <= LOG_FLOOR).count_nonzero()) / n,
    )


def _deviation(x: Float[Tensor, " n"]) -> float:
    """Population standard deviation, in float64 without a copy of all numbers."""
    parts = x.split(_chunk(x))
    mean = torch.stack([part.sum(dtype=torch.float64) for part in parts]).sum() / len(x)
    squares = torch.stack([(part.double() - mean).square().sum() for part in parts]).sum()
    return (squares / len(x)).sqrt().item()


def _ranked(x: Float[Tensor, " n"], rank: int) -> Float[Tensor, ""]:
    """The entry of this rank, from 0. On a CPU numpy finds it ten times as fast as torch."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.partition(x.numpy(), rank)[rank : rank + 1]).squeeze(0)
    return x.kthvalue(rank + 1).values


def entropy_signal(
    entropy: Float[Tensor, "*shape"],
    stats: EntropyStats,
    variant: Literal["paper", "release"] = "paper",
) -> Float[Tensor, "*shape"]:
    """The signal h of HAPO, eqs. 5-7, a constant for autograd.

    h = d / h_max above the pivot and d / |h_min| at or below it, with d = log H - pivot: +1 at the most
    uncertain token, 0 at the pivot, -1 at the most certain one. `variant="release"` computes what the
    authors' code does: the lower branch without its sign, so h >= 0 everywhere.
    """
    up = max(stats.h_max, SCALE_FLOOR)
    down = max(-stats.h_min, SCALE_FLOOR) * (1 if variant == "paper" else -1)

    # Pivot and scales are distances between numbers of this precision, so that the ends are +1 and -1 exactly.
    d = log_entropy(entropy.detach().contiguous()).sub_(stats.pivot)
    scales = d.new_tensor(up), d.new_tensor(down)
    for part in d.view(-1).split(_chunk(d)):  # in place: a rollout batch may have gigabytes
        part.div_(torch.where(part >= 0, *scales))
    return d
