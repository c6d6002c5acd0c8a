"""Rollout batches across ranks: gathering, padding, and dynamic sampling. Plumbing only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from trl.trainer.utils import RepeatSampler

TensorDict = dict[str, Tensor]


class EpochSampler(RepeatSampler):
    """TRL's sampler, its order a function of seed and epoch alone, so that a resumed run sees the same order."""

    def __init__(self, *args: Any, trainer_state: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._state = trainer_state

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + int(self._state().epoch or 0))
        return super().__iter__()


class FreshPrompts:
    """An endless, seeded order of the training prompts for dynamic sampling; its state is one counter."""

    def __init__(self, dataset: Any, seed: int, position: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed
        self.position = position
        self._order: tuple[int, list[int]] = (-1, [])

    def take(self, n: int, used: set[str]) -> list[dict[str, Any]]:
        """The next n prompts that are not in `used` (and adds them); fewer once a whole pass gave nothing."""
        taken: list[dict[str, Any]] = []
        for _ in range(2 * len(self.dataset)):
            if len(taken) == n:
                break
            row = self.dataset[self._index()]
            if prompt_key(row) not in used:
                used.add(prompt_key(row))
                taken.append(row)
        return taken

    def _index(self) -> int:
        epoch, offset = divmod(self.position, len(self.dataset))
        self.position += 1
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._order = epoch, torch.randperm(len(self.dataset), generator=generator).tolist()
        return self._order[1][offset]


def prompt_key(row: dict[str, Any]) -> str:
    """Identity of a prompt."""
    return json.dumps(row.get("prompt"), sort_keys=True, default=str)


def gather_rows(accelerator: Accelerator, tensors: TensorDict, left: frozenset[str]) -> TensorDict:
    """The rows of all ranks, in rank order; (B,T) tensors padded with zeros to the widest rank.

    Names in `left` are padded on the left (prompts).
    """
    if accelerator.num_processes == 1:
        return dict(tensors)
    out = {}
    for name, x in tensors.items():
        as_bool = x.dtype == torch.bool
        x = x.to(torch.uint8) if as_bool else x
        if x.ndim > 1:
            x = accelerator.pad_across_processes(x, dim=1, pad_first=name in left)
        x = accelerator.gather(x)
        out[name] = x.bool() if as_bool else x
    return out


def concat_rows(parts: list[TensorDict], left: frozenset[str]) -> TensorDict:
    """Row-wise concatenation; (B,T) tensors padded with zeros to the widest part."""
    out = {}
    for name in parts[0]:
        xs = [part[name] for part in parts]
        if xs[0].ndim > 1:
            width = max(x.shape[1] for x in xs)
            xs = [_pad(x, width - x.shape[1], name in left) for x in xs]
        out[name] = torch.cat(xs)
    return out


def _pad(x: Tensor, n: int, left: bool) -> Tensor:
    return torch.nn.functional.pad(x, (n, 0) if left else (0, n))


def prompts_to_draw(missing: int, kept: int, drawn: int, most: int, group_size: int, world: int) -> int:
    """Prompts of the next round: enough for the missing groups at the share kept so far, at most `most`.

    Rounded up so that every rank gets equally many rows.
    """
    share = max(kept, 1) / max(drawn, 1)
    want = min(most, math.ceil(missing / share))
    unit = world // math.gcd(world, group_size)
    return math.ceil(want / unit) * unit
