"""Credit per turn: what each turn of an episode earned, against the same turn of the other episodes of its group.

Shapes: B episodes, T tokens, of at most T turns. Constants for autograd. Masked places are never read.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..batch import masked, working_dtype
from .advantage import STD_EPS, Scale, Singleton, group_advantage
from .credit import Finished, position_returns


def turn_index(mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Number of the run of valid tokens that a token is of, from 0.

    Runs are turns where the environment, or a tool, says something between two of them: its tokens are masked. At
    a masked place stands the number of the run before it, or 0.
    """
    begins = mask.clone()
    begins[:, 1:] &= ~mask[:, :-1]
    return (begins.cumsum(-1) - 1).clamp_min(0)


def turn_returns(
    token_reward: Float[Tensor, "B T"],
    reward: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    turn: Int[Tensor, "B T"],
    gamma: float = 1.0,
    finished: Finished = "last",
) -> Float[Tensor, "B T"]:
    """G_s = r_s + gamma G_{s+1} of turn s in column s; r_s is the sum of the rewards of its tokens.

    As `position_returns`, with turns in the place of tokens: gamma discounts between turns, and `finished` says
    where an episode stands that has ended before turn s. Columns above the last turn of all episodes are
    those of ended ones.

    Raises:
        ValueError: the number of a turn is below 0, or not below T.
    """
    turn = _at_valid(turn, mask)
    per_turn = torch.zeros_like(token_reward, dtype=torch.float64)
    per_turn.scatter_add_(1, turn, masked(token_reward.detach(), mask).double())
    returns = position_returns(per_turn, reward, _taken(turn, mask), gamma, finished)
    return returns.to(working_dtype(token_reward))


def turn_advantage(
    returns: Float[Tensor, "B T"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    turn: Int[Tensor, "B T"],
    *,
    singleton: Singleton = "zero",
    std_eps: float = STD_EPS,
    scale: Scale = "group",
) -> Float[Tensor, "B T"]:
    """`group_advantage` of each column of `turn_returns`, the same on all tokens of the turn.

    A_is = (G_is - mean_k G_ks) / (std_k G_ks + 1e-6) over the episodes k of the group: a baseline for each turn.
    With one turn it is the outcome form.

    Raises:
        ValueError: as `turn_returns`.
    """
    turn = _at_valid(turn, mask)
    options = {"singleton": singleton, "std_eps": std_eps, "scale": scale}
    advantage = group_advantage(returns, group, _taken(turn, mask), **options)  # type: ignore[arg-type]
    return masked(advantage.gather(1, turn), mask)


def _at_valid(turn: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """The numbers, 0 at masked places."""
    turn = turn.long().masked_fill(~mask, 0)
    if bool(((turn < 0) | (turn >= mask.shape[1])).any()):
        raise ValueError(
            f"turn holds numbers from {int(turn.min())} to {int(turn.max())}: they begin at 0, and a row of "
            f"{mask.shape[1]} tokens has no more turns than that"
        )
    return turn


def _taken(turn: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Whether an episode has a turn of this number, in its column."""
    return torch.zeros_like(turn).scatter_add(1, turn, mask.long()) > 0
