"""Where verl keeps a rollout batch between its steps, and how the columns are read and written.

One class for each trainer of verl: `ProtoColumns` here, `queue.QueueColumns` for the default one. What reads
columns knows neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Bool
from tensordict import TensorDict
from torch import Tensor
from verl.workers.utils.padding import response_to_nested


class Columns(Protocol):
    """A rollout batch of B responses, padded to T tokens when it is read."""

    def read(self, *names: str) -> dict[str, Tensor]:
        """Those of these columns that are there: (B,T), and 0 beyond the end of a response."""

    def write(self, made: Mapping[str, Tensor]) -> None:
        """Columns (B,T) or (B,) beside verl's own, or in their place; all of them reach the actors."""

    def infos(self) -> list[dict[str, Any]]:
        """What the reward function returned beside the score, a dictionary for each response."""

    def tell(self, name: str, value: Any) -> None:
        """Send a value to the actors with the batch."""

    @property
    def added(self) -> Bool[Tensor, " B"]:
        """Rows that verl added to fill its ranks."""


class ProtoColumns:
    """Of the trainer without a queue: a `DataProto` in its process, padded already."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def read(self, *names: str) -> dict[str, Tensor]:
        """As they are."""
        return {name: self.batch.batch[name] for name in names if name in set(self.batch.batch.keys())}

    def write(self, made: Mapping[str, Tensor]) -> None:
        """Into the batch."""
        for name, x in made.items():
            self.batch.batch[name] = x

    def infos(self) -> list[dict[str, Any]]:
        """verl made a column of each."""
        names = self.batch.meta_info.get("reward_extra_keys", [])
        columns = {name: self.batch.non_tensor_batch[name] for name in names}
        return [{name: column[i] for name, column in columns.items()} for i in range(len(self.batch))]

    def tell(self, name: str, value: Any) -> None:
        """With verl's own."""
        self.batch.meta_info[name] = value

    @property
    def added(self) -> Bool[Tensor, " B"]:
        """None: this trainer refuses numbers of rows that its ranks do not divide."""
        return torch.zeros(len(self.batch), dtype=torch.bool)


def like(x: Tensor, response_mask: Tensor) -> Tensor:
    """(B,T) in the layout of verl's data at hand: rows of their own length, or padded to its width."""
    if response_mask.is_nested:
        return response_to_nested(x, response_mask)
    return torch.nn.functional.pad(x, (0, response_mask.shape[1] - x.shape[1]))


def prompts_of(data: TensorDict) -> list[Tensor]:
    """The tokens of each prompt in verl's data at hand: rows of their own length, or padded on the left."""
    prompts = data["prompts"]
    if prompts.is_nested:
        return list(prompts.unbind())
    there = data["attention_mask"][:, : prompts.shape[1]].bool()
    return [row[mask] for row, mask in zip(prompts, there, strict=True)]
