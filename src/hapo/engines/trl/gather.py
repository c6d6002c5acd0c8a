"""Rows of all ranks, and of several rollouts, as one set of tensors."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

TensorDict = dict[str, Tensor]

LEFT_PADDED = frozenset({"prompt_ids", "prompt_mask"})

PADDED_WITH = {"support": -1}
"""What stands in padding, where that is not 0."""


def gather_rows(accelerator: Accelerator, tensors: TensorDict) -> TensorDict:
    """The rows of all ranks, in rank order; (B,T) and (B,T,K) tensors padded to the widest rank, prompts on the
    left."""
    if accelerator.num_processes == 1:
        return dict(tensors)
    out = {}
    for name, x in tensors.items():
        as_bool = x.dtype == torch.bool
        x = x.to(torch.uint8) if as_bool else x
        for dim in range(1, x.ndim):
            fill = PADDED_WITH.get(name, 0)
            x = accelerator.pad_across_processes(x, dim=dim, pad_index=fill, pad_first=name in LEFT_PADDED)
        x = accelerator.gather(x)
        out[name] = x.bool() if as_bool else x
    return out


def concat_rows(parts: list[TensorDict]) -> TensorDict:
    """Row-wise concatenation; (B,T) and (B,T,K) tensors padded to the widest part, prompts on the left."""
    out = {}
    for name in parts[0]:
        xs = [part[name] for part in parts]
        for dim in range(1, xs[0].ndim):
            width = max(x.shape[dim] for x in xs)
            xs = [_pad(x, dim, width - x.shape[dim], name) for x in xs]
        out[name] = torch.cat(xs)
    return out


def _pad(x: Tensor, dim: int, n: int, name: str) -> Tensor:
    fill = x.new_full((*x.shape[:dim], n, *x.shape[dim + 1 :]), PADDED_WITH.get(name, 0))
    return torch.cat([fill, x] if name in LEFT_PADDED else [x, fill], dim)
