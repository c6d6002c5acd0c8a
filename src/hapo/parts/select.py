"""Which responses and tokens take part in an update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .entropy import masked_quantile
from .groups import equal_rewards


def mixed_groups(
    verdict: Float[Tensor, " B"], group: Int[Tensor, " B"], rows: Bool[Tensor, " B"]
) -> Bool[Tensor, " B"]:
    """Rows of groups whose verdicts differ (DAPO's dynamic sampling, arXiv 2503.14476, eq. 11).

    It acts on the verifier's verdict, not on the shaped reward: with a length penalty even an all-correct
    group has some spread. `rows` are the responses that count. A group of one is never kept.
    """
    return ~equal_rewards(verdict, group, rows) & rows


def most_uncertain(entropy: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], rho: float) -> Bool[Tensor, "B T"]:
    """The ceil(rho N) valid tokens of highest entropy, and all that tie with the last (80/20, arXiv 2506.01939).

    1e-9 is taken off rho N before rounding up, so that an exact product stays what it is; at least one token.
    """
    n = int(mask.sum())
    if n == 0:
        return mask
    k = max(1, math.ceil(rho * n - 1e-9))
    h = torch.where(mask, entropy.detach(), -torch.inf)
    return mask & (h >= h.flatten().topk(k).values[-1])


def smallest(k: int, keys: Sequence[Float[Tensor, "B T"]], mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """The k valid tokens of smallest first key; where it is equal the second decides, and so on.

    Of tokens that are equal in all keys those of the lower row come first, then of the lower position; all valid
    tokens where k is above their number.
    """
    place = mask.flatten().nonzero().squeeze(1)
    for key in reversed(keys):
        place = place[key.detach().flatten()[place].argsort(stable=True)]
    chosen = torch.zeros_like(mask).flatten()
    chosen[place[:k]] = True
    return chosen.view_as(mask)


def largest_share(
    entropy: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    rho: float,
    ties: Literal["all", "first"] = "all",
) -> Float[Tensor, "B T"]:
    """1 at the max(1, floor(rho N)) valid tokens of highest entropy, 0 elsewhere (EGSPO, arXiv 2602.03309).

    1e-9 is added to rho N before rounding down, so that an exact product stays what it is. Of tokens that tie with
    the last, "all" have 1, whatever the order of the rows, or the "first" ones of the batch, row by row.
    """
    n = int(mask.sum())
    if n == 0:
        return torch.zeros_like(entropy)
    k = max(1, math.floor(rho * n + 1e-9))
    h = torch.where(mask, entropy.detach(), -torch.inf).flatten()
    if ties == "all":
        chosen = h >= h.topk(k).values[-1]
    else:
        chosen = torch.zeros_like(h, dtype=torch.bool)
        chosen[h.sort(descending=True, stable=True).indices[:k]] = True
    return (mask & chosen.view_as(mask)).to(entropy.dtype)


def on_policy(
    logp: Float[Tensor, "B T"],
    drawn_logp: Float[Tensor, "B T"],
    advantage: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    threshold: float,
) -> Bool[Tensor, "B T"]:
    """False where A < 0 in a response that the policy has left: (1/n_i) sum_t m (drawn_logp - logp) > threshold.

    The off-policy sequence mask of DeepSeek-V3.2 (arXiv 2512.02556, section 3.1); threshold in nats per token. A
    constant for autograd.
    """
    away = torch.where(mask, drawn_logp - logp.detach(), 0.0).sum(-1, keepdim=True)
    away = away / mask.sum(-1, keepdim=True).clamp_min(1)
    return (advantage >= 0) | (away <= threshold)


def not_spurious(
    logp: Float[Tensor, "B T"],
    entropy: Float[Tensor, "B T"],
    advantage: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    tau_p: float,
    q: float,
    scope: Literal["candidates", "all"] = "candidates",
) -> Bool[Tensor, "B T"]:
    """The S2T mask: False for rare, confident tokens of positive advantage (STAPO, arXiv 2602.15620).

    Candidates are the valid tokens with A > 0 and exp(logp) < tau_p; dropped are those of them whose entropy is
    below the q-quantile (linear) of the candidates' entropies, or with `scope="all"` of all valid tokens'.
    Comparisons are strict, so a lone candidate stays. Constants for autograd.
    """
    candidate = mask & (advantage > 0) & (logp.detach().exp() < tau_p)
    h = entropy.detach().double()
    pool = candidate if scope == "candidates" else mask
    threshold = masked_quantile(h.flatten(), pool.flatten(), q)
    return mask & ~(candidate & (h < threshold))
