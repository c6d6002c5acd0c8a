"""Credit per turn: what each turn of an episode earned, against the same turn of the other episodes of its group.

Shapes: B episodes, T tokens. A turn is a run of valid tokens, between two of which the environment answers, whose
tokens are masked; there are at most T. Constants for autograd.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..batch import masked, working_dtype
from .advantage import STD_EPS, Scale, Singleton, group_advantage
from .credit import Finished, position_returns


def turn_index(mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Number of the turn that a valid token is of, from 0; at a masked place that of the turn before it, or 0."""
    begins = mask.clone()
    begins[:, 1:] &= ~mask[:, :-1]
    return (begins.cumsum(-1) - 1).clamp_min(0)


def turn_returns(
    token_reward: Float[Tensor, "B T"],
    reward: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    gamma: float = 1.0,
    finished: Finished = "last",
) -> Float[Tensor, "B T"]:
    """G_s = r_s + gamma G_{s+1} of turn s in column s; r_s is the sum of the rewards of its tokens.

    As `position_returns`, with turns in the place of tokens: gamma discounts between turns, and `finished` says
    where an episode stands that has ended before turn s. Columns above the last turn of all episodes are
    those of ended ones.
    """
    turn = turn_index(mask)
    per_turn = torch.zeros_like(token_reward, dtype=torch.float64)
    per_turn.scatter_add_(1, turn, masked(token_reward.detach(), mask).double())
    returns = position_returns(per_turn, reward, _taken(turn, mask), gamma, finished)
    return returns.to(working_dtype(token_reward))


def turn_advantage(
    returns: Float[Tensor, "B T"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    singleton: Singleton = "zero",
    std_eps: float = STD_EPS,
    scale: Scale = "group",
) -> Float[Tensor, "B T"]:
    """`group_advantage` of each column of `turn_returns`, the same on all tokens of the turn.

    A_is = (G_is - mean_k G_ks) / (std_k G_ks + 1e-6) over the episodes k of the group: a baseline for each turn.
    With one turn it is the outcome form.
    """
    turn = turn_index(mask)
    options = {"singleton": singleton, "std_eps": std_eps, "scale": scale}
    advantage = group_advantage(returns, group, _taken(turn, mask), **options)  # type: ignore[arg-type]
    return masked(advantage.gather(1, turn), mask)


def _taken(turn: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Whether an episode has a turn of this number, in its column."""
    return torch.zeros_like(turn).scatter_add(1, turn, mask.long()) > 0
