"""Credit: what each token earned, and the return from each token on, of rewards per token.

Shapes: B sequences, T tokens, K channels. Everything here is a constant for autograd, computed in float64 and
returned in float32 (float64 stays). Masked places are never read: a reward there is no reward, and a token that is
followed by a masked stretch (the output of a tool) is followed by the next valid one, as in verl. gamma discounts
per valid token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..batch import masked, working_dtype
from .groups import group_index, group_sum
from .penalty import k1

LEAST_SUM = 1e-8
"""Attributions whose sum is nearer to 0 than this are spread evenly in the place of being divided by it."""

Finished = Literal["last", "out"]
Normalisation = Literal["sum", "softmax", "abs"]


def reward_to_go(
    token_reward: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], gamma: float = 1.0
) -> Float[Tensor, "B T"]:
    """G_t = r_t + gamma G_{t+1} over the valid tokens of a row, 0 after its last; 0 at masked places.

    With gamma = 1 the return of the first token is the sum of the row's rewards.
    """
    going = _to_go(token_reward, mask, gamma)
    return masked(going.to(working_dtype(token_reward)), mask)


def gae(
    token_reward: Float[Tensor, "B T"],
    value: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    gamma: float = 1.0,
    lam: float = 1.0,
) -> Float[Tensor, "B T"]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16); 0 at masked places.

    A_t = d_t + gamma lam A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t, over the valid tokens of a row; V and A are 0
    after its last. lam = 1 is the return less the value, lam = 0 the temporal difference d_t. Not normalised (verl
    whitens it). `value` comes from a critic; the methods here have none, and compare a response with its group
    instead.
    """
    reward, v = (masked(x.detach(), mask).double() for x in (token_reward, value))
    after, delta = v.new_zeros(len(v)), torch.zeros_like(v)
    for t in range(mask.shape[1] - 1, -1, -1):
        delta[:, t] = reward[:, t] + gamma * after - v[:, t]
        after = torch.where(mask[:, t], v[:, t], after)
    return masked(_backward(delta, mask, gamma * lam).to(working_dtype(token_reward)), mask)


def group_baseline(
    returns: Float[Tensor, "B T"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    leave_one_out: bool = False,
) -> Float[Tensor, "B T"]:
    """The mean return at each position over the rows of the group that have a valid token there; 0 at masked
    places.

    Rows that have ended before a position are not in its mean, so that it may be of fewer rows than the group has,
    at the end of the longest row of that row alone. With `leave_one_out` a row is not in its own mean; one that is
    alone at a position has its own return as baseline, so that its advantage is 0. A row with a NaN at a valid
    place could not be scored: it is in no mean, and its baseline is 0. Take it over a whole rollout batch at once.
    """
    scored = ~(returns.isnan() & mask).any(-1, keepdim=True)
    counted = mask & scored
    g = torch.where(counted, returns.detach().double(), 0.0)
    index, k = group_index(group)
    n = group_sum(counted.double(), index, k)[index]
    total = group_sum(g, index, k)[index]
    mean = total / n.clamp_min(1)
    if leave_one_out:
        mean = torch.where(n > 1, (total - g) / (n - 1).clamp_min(1), g)
    return masked(mean.to(working_dtype(returns)), counted)


def position_returns(
    token_reward: Float[Tensor, "B T"],
    reward: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    gamma: float = 1.0,
    finished: Finished = "last",
) -> Float[Tensor, "B T"]:
    """What stands in each column in the place of `reward` where an advantage compares responses: `reward_to_go`.

    The parts of `parts.advantage` take it column by column: the advantage of a token is that of an outcome method
    whose rewards are the returns from this position on. So that every response of a group stands somewhere:

    - at a masked place before its last token a row has the return of its next valid token;
    - after its last token it has the return of that token (`finished="last"`), or NaN, which is in no count
      (`"out"`: rows that are alive at a position are compared with each other alone);
    - a row without valid tokens has its `reward`, in every column;
    - a row whose reward is NaN could not be scored, and is NaN.

    With `finished="last"` and gamma = 1, rewards that are 0 but at the last token give `reward` in every column,
    bit for bit, whatever the lengths: the outcome form of the method.
    """
    going = _to_go(token_reward, mask, gamma)
    ended = _left(mask) == 0
    if finished == "last":
        at_last = masked(token_reward.detach(), last_token(mask)).double().sum(-1, keepdim=True)
        going = torch.where(ended, at_last, going)
    else:
        going = going.masked_fill(ended, torch.nan)
    outcome = reward.double().unsqueeze(1)
    going = torch.where(mask.any(-1, keepdim=True), going, outcome).masked_fill(outcome.isnan(), torch.nan)
    return going.to(working_dtype(token_reward))


def kl_in_reward(
    token_reward: Float[Tensor, "B T"],
    logp: Float[Tensor, "B T"],
    ref_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    beta: float,
) -> Float[Tensor, "B T"]:
    """R_t = r_t - beta (logp_t - ref_t), the classic objective's penalty (arXiv 2504.16272; InstructGPT, eq. 2).

    logp is that of the policy which drew the tokens. Nats, held to +-20; no gradient. A penalty that is
    differentiated is `parts.penalty`.
    """
    penalty = beta * k1(masked(logp.detach(), mask), masked(ref_logp.detach(), mask))
    return masked(masked(token_reward.detach(), mask) - penalty, mask)


def last_token(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """True at the last valid token of each row; nowhere in a row without any."""
    return mask & (_left(mask) == 1)


def onto_valid_tokens(token_reward: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Rewards at masked places go to the last valid token before them, or to the first where there is none before.

    For an engine whose rewards stand on all tokens of a response, the output of tools among them: what an answer
    of a tool earned, the call earned. The sum of a row stays; a row without valid tokens has none.
    """
    place = torch.arange(mask.shape[1], device=mask.device)
    before = torch.where(mask, place, -1).cummax(-1).values
    first = mask.int().argmax(-1, keepdim=True) if mask.shape[1] else place
    target = torch.where(before < 0, first, before)
    moved = torch.zeros_like(token_reward).scatter_add(1, target, token_reward)
    return torch.where(mask, moved, 0.0)


def shaped_reward(
    reward: Float[Tensor, " B"],
    attribution: Float[Tensor, "B K T"],
    weight: Sequence[int | float] | Float[Tensor, " K1"],
    mask: Bool[Tensor, "B T"],
    *,
    normalisation: Sequence[Normalisation] | None = None,
    mode: Literal["normalised", "additive"] = "normalised",
) -> Float[Tensor, "B T"]:
    """Rewards per token from attributions of the response's reward (arXiv 2504.16272; its code is not public).

    normalised: r'_t = r sum_k w_k E_kt, the rows E_k of `attribution_share` sum to 1, and so sum_t r'_t = r for
    every w. additive: r'_t = sum_k w_k c_kt, c the attribution itself; the sum falls short of r by what the
    attributions leave unexplained, sum_k w_k (r - sum_t c_kt). In both, one channel more than the K that are given
    is the sparse one, r on the last valid token: with weight 1 it is the outcome form. r' is linear in w.

    A channel with an attribution that is not finite at a valid token is the sparse one in that row. A row whose
    reward is not finite could not be scored: it is NaN. Neither has a gradient.

    Args:
        reward: r of each response.
        attribution: what each token added to r, by K explanations.
        weight: w of the K channels and of the sparse one, in this order: >= 0, of sum 1.
        mask: valid response tokens; 0 elsewhere.
        normalisation: how each of the K channels is brought to the sum 1; None: "sum" and "softmax", for two that
            are Shapley values and LIME. The mode "additive" normalises nothing.
        mode: as above.

    Raises:
        ValueError: another number of weights than K + 1, or weights that are no shares; another number of
            normalisations than K, or any in the mode "additive"; an unknown normalisation or mode.
    """
    k = attribution.shape[1]
    w = torch.as_tensor(weight, dtype=torch.float64, device=mask.device).detach()
    if w.shape != (k + 1,):
        raise ValueError(
            f"weight has {w.numel()} numbers for {k} attributions: give one for each, and the last for the sparse "
            "channel, the reward on the last token"
        )
    if not bool(w.isfinite().all() and (w >= 0).all() and (w.sum() - 1).abs() <= 1e-6):
        raise ValueError(f"weight must be numbers >= 0 of sum 1, got {w.tolist()}, of sum {float(w.sum()):g}")
    r = reward.detach().double().unsqueeze(1)
    sparse = last_token(mask).double()
    rows = []
    if mode == "normalised":
        how = ("sum", "softmax") if normalisation is None else normalisation
        if len(how) != k:
            raise ValueError(f"normalisation has {len(how)} names for {k} attributions; give one for each")
        rows = [r * attribution_share(attribution[:, i], mask, one) for i, one in enumerate(how)]
    elif mode != "additive":
        raise ValueError(f"mode must be one of 'normalised', 'additive', got {mode!r}")
    elif normalisation is not None:
        raise ValueError(f"normalisation must be None with mode='additive', got {normalisation!r}")
    else:
        for phi in attribution.detach().double().unbind(1):
            whole = _finite(phi, mask)
            rows.append(torch.where(whole, torch.where(mask, phi, 0.0), r * sparse))
    mixed = torch.stack([*rows, r * sparse], 1)
    shaped = (w.view(1, -1, 1) * mixed).sum(1).masked_fill(~r.isfinite(), torch.nan)
    return masked(shaped.to(working_dtype(reward)), mask)


def attribution_share(
    attribution: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], normalisation: Normalisation = "sum"
) -> Float[Tensor, "B T"]:
    """A row E of sum 1 over the valid tokens, float64; 0 at masked places.

    "sum": phi / sum(phi), unbounded where positive and negative attributions nearly cancel. "softmax": exp(phi)
    over its sum. "abs": |phi| / sum |phi|. The last two lie in [0, 1], and lose the sign. A sum within 1e-8 of 0
    gives 1/n on each of the n tokens. A row with an attribution that is not finite is 1 on its last token.

    Raises:
        ValueError: an unknown normalisation.
    """
    if normalisation not in ("sum", "softmax", "abs"):
        raise ValueError(f"normalisation must be one of 'sum', 'softmax', 'abs', got {normalisation!r}")
    whole = _finite(attribution, mask)
    phi = torch.where(mask & whole, attribution.detach().double(), 0.0)
    if normalisation == "softmax":
        highest = torch.where(mask, phi, -torch.inf).amax(-1, keepdim=True)
        share = torch.where(mask, (phi - highest).exp(), 0.0)
    else:
        share = phi.abs() if normalisation == "abs" else phi
    total = share.sum(-1, keepdim=True)
    even = mask.double() / mask.sum(-1, keepdim=True).clamp_min(1)
    share = torch.where(total.abs() > LEAST_SUM, share / total, even)
    return torch.where(whole, torch.where(mask, share, 0.0), last_token(mask).double())


def _finite(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B 1"]:
    """Rows that are finite at all valid places."""
    return (x.isfinite() | ~mask).all(-1, keepdim=True)


def _left(mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Valid tokens from each place on."""
    return mask.flip(-1).cumsum(-1).flip(-1)


def _to_go(token_reward: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], gamma: float) -> Float[Tensor, "B T"]:
    """Returns in float64, at a masked place that of the next valid token."""
    return _backward(masked(token_reward.detach(), mask).double(), mask, gamma)


def _backward(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], decay: float) -> Float[Tensor, "B T"]:
    """y_t = x_t + decay y_{t+1} at valid places, y_{t+1} at masked ones; 0 after the last."""
    y, out = x.new_zeros(len(x)), torch.empty_like(x)
    for t in range(x.shape[1] - 1, -1, -1):
        y = torch.where(mask[:, t], x[:, t] + decay * y, y)
        out[:, t] = y
    return out
