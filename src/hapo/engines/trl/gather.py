"""Rows of all ranks, and of several rollouts, as one set of tensors."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

TensorDict = dict[str, Tensor]

LEFT_PADDED = frozenset({"prompt_ids", "prompt_mask"})


def gather_rows(accelerator: Accelerator, tensors: TensorDict) -> TensorDict:
    """The rows of all ranks, in rank order; (B,T) tensors zero-padded to the widest rank, prompts on the left."""
    if accelerator.num_processes == 1:
        return dict(tensors)
    out = {}
    for name, x in tensors.items():
        as_bool = x.dtype == torch.bool
        x = x.to(torch.uint8) if as_bool else x
        if x.ndim > 1:
            x = accelerator.pad_across_processes(x, dim=1, pad_first=name in LEFT_PADDED)
        x = accelerator.gather(x)
        out[name] = x.bool() if as_bool else x
    return out


def concat_rows(parts: list[TensorDict]) -> TensorDict:
    """Row-wise concatenation; (B,T) tensors zero-padded to the widest part, prompts on the left."""
    out = {}
    for name in parts[0]:
        xs = [part[name] for part in parts]
        if xs[0].ndim > 1:
            width = max(x.shape[1] for x in xs)
            xs = [_pad(x, width - x.shape[1], name in LEFT_PADDED) for x in xs]
        out[name] = torch.cat(xs)
    return out


def _pad(x: Tensor, n: int, left: bool) -> Tensor:
    return torch.nn.functional.pad(x, (n, 0) if left else (0, n))
