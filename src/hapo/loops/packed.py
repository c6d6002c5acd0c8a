"""Segments of episodes as tensors.

Shapes: R segments, C columns, S turns, L tokens of a turn; N states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .turns import Segment


class Packed(NamedTuple):
    """Segments as tensors."""

    ids: Int[Tensor, "R C"]
    attention: Int[Tensor, "R C"]
    at: Int[Tensor, "2 N"]
    """Row and column of each state: the column that predicts its token."""
    place: Int[Tensor, "3 N"]
    """Segment, turn and token of each state; the state after a segment's last turn has a turn of its own."""
    action: Int[Tensor, " N"]
    taken: Bool[Tensor, " N"]
    """A token was taken in this state, and not only looked at for its value."""
    mask: Bool[Tensor, "R S L"]
    reward: Float[Tensor, "R S"]
    goes_on: Bool[Tensor, "R S"]


def pack(segments: Sequence[Segment], pad: int, device: torch.device) -> Packed:
    """Segments padded on the right. A turn without tokens has no state, and no place in the loss."""
    width = max(len(one.ids) for one in segments)
    turns = max(len(one.turns) for one in segments)
    length = max([1, *(len(turn.ids) for one in segments for turn in one.turns)])
    states: list[tuple[int, int, int, int, int, bool]] = []
    mask = torch.zeros(len(segments), turns, length, dtype=torch.bool)
    reward, goes_on = torch.zeros(len(segments), turns), torch.ones(len(segments), turns, dtype=torch.bool)
    for r, one in enumerate(segments):
        for s, turn in enumerate(one.turns):
            mask[r, s, : len(turn.ids)] = True
            reward[r, s], goes_on[r, s] = turn.reward, turn.goes_on
            states += [(r, turn.start - 1 + j, s, j, token, True) for j, token in enumerate(turn.ids)]
            if not turn.ids:
                states.append((r, turn.start - 1, s, 0, pad, False))
        if one.turns[-1].goes_on:
            states.append((r, len(one.ids) - 1, len(one.turns), 0, pad, False))
    row, column, turn_, token_, action, taken = (torch.tensor(x, device=device) for x in zip(*states, strict=True))
    ids = torch.tensor([one.ids + [pad] * (width - len(one.ids)) for one in segments], device=device)
    attention = torch.tensor(
        [[1] * len(one.ids) + [0] * (width - len(one.ids)) for one in segments], device=device
    )
    place = torch.stack([row, turn_, token_])
    at = torch.stack([row, column])
    return Packed(ids, attention, at, place, action, taken, mask.to(device), reward.to(device), goes_on.to(device))
