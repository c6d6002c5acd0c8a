"""TransferQueue, in which verl's default trainer keeps a rollout batch: the one file here that knows it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import transfer_queue
from jaxtyping import Bool
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import response_to_nested


class QueueColumns:
    """`Columns` of a batch of which the trainer holds the keys alone; each response has its own length."""

    def __init__(self, batch: Any) -> None:
        """
        Raises:
            ValueError: a session of several outputs, which verl writes as several rows uid_session_index.
        """
        for key in batch.keys:
            if not key.endswith("_0"):
                raise ValueError(
                    f"the agent loop returned a session in several outputs ({key}), and a token group average "
                    "over its parts would count it several times: return one output a session"
                )
        self.batch = batch

    def read(self, *names: str) -> dict[str, Tensor]:
        """Fetched, and padded to the longest response."""
        found = self._get(*names)
        return dict(found.select(*(set(names) & set(found.keys()))).to_padded_tensor().items())

    def write(self, made: Mapping[str, Tensor]) -> None:
        """Padding is cut off."""
        nested = {
            name: response_to_nested(x, self._response_mask) if x.ndim > 1 else x for name, x in made.items()
        }
        fields = TensorDict(nested, batch_size=len(self.batch.keys))
        keys, partition = self.batch.keys, self.batch.partition_id
        self.batch = transfer_queue.kv_batch_put(keys=keys, partition_id=partition, fields=fields)

    def infos(self) -> list[dict[str, Any]]:
        """From the extra fields of the agent loop."""
        return [extra.get("reward_extra_info", {}) for extra in tu.get(self._get("extra_fields"), "extra_fields")]

    def tell(self, name: str, value: Any) -> None:
        """With verl's own."""
        self.batch.extra_info[name] = value

    @property
    def added(self) -> Bool[Tensor, " B"]:
        """By verl's tags."""
        return torch.tensor([bool(tag.get("is_padding", False)) for tag in self.batch.tags])

    @cached_property
    def _response_mask(self) -> Tensor:
        return self._get("response_mask")["response_mask"]

    def _get(self, *names: str) -> TensorDict:
        keys, partition = self.batch.keys, self.batch.partition_id
        return transfer_queue.kv_batch_get(keys=keys, partition_id=partition, select_fields=list(names))
