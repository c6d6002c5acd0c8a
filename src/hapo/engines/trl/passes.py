"""A micro-batch in several passes of forward and backward, each of a bounded number of tokens.

Losses of the slices of an optimiser step add up to the step's, so rows may be taken in any order and number.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedType
from jaxtyping import Bool, Int
from torch import Tensor

from ...prompts import distinct_rows

CPU_TOKENS, DEVICE_TOKENS = 2048, 16384
"""Tokens of a pass where the user sets none: what keeps a processor busy, and what keeps an accelerator busy."""

NOT_TEXT = frozenset({"pixel_values", "image_grid_thw", "num_images", "token_type_ids", "mm_token_type_ids"})


def passes(
    prompt_ids: Int[Tensor, "B P"], prompt_mask: Int[Tensor, "B P"], mask: Bool[Tensor, "B T"], most: int
) -> list[Int[Tensor, " b"]]:
    """Rows of each pass: those with a valid token, equal prompts and like lengths together, in the fewest passes.

    A pass costs its distinct prompts and its responses, each padded to the longest; a row alone may exceed `most`,
    and so may a pass of a model so small that running its prompts once does not pay (`hapo.prompts`).
    All rows in their order where they fit, or where none has a valid token.
    """
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    responses = (mask * columns).amax(1)
    rows = responses.nonzero().squeeze(1)
    if not len(rows):
        return [torch.arange(len(mask), device=mask.device)]
    _, prompt = distinct_rows(prompt_ids, prompt_mask)
    sizes = torch.stack([prompt_mask.sum(1), prompt, responses], 1)[rows].tolist()
    order = sorted(range(len(rows)), key=lambda i: sizes[i])
    parts: list[list[int]] = [[]]
    longest_prompt = longest = 0
    distinct: set[int] = set()
    for i in order:
        length, number, response = sizes[i]
        wider, longer = max(longest_prompt, length), max(longest, response)
        if parts[-1] and len(distinct | {number}) * wider + (len(parts[-1]) + 1) * longer > most:
            parts.append([])
            distinct, wider, longer = set(), length, response
        parts[-1].append(i)
        distinct.add(number)
        longest_prompt, longest = wider, longer
    if len(parts) == 1:
        return [torch.arange(len(mask), device=mask.device)]
    return [rows[torch.tensor(part, device=rows.device)] for part in parts]


def split(
    inputs: dict[str, Any], mask: Bool[Tensor, "B T"], most: int | None
) -> list[tuple[dict[str, Any], Bool[Tensor, "B T"]]]:
    """Inputs and mask of each pass over a micro-batch; as they are where it fits, or holds images.

    Args:
        inputs: a dict of TRL's.
        mask: tokens that are needed.
        most: tokens of a pass; None: what suits the device; 0: no limit.
    """
    if most is None:
        most = CPU_TOKENS if mask.device.type == "cpu" else DEVICE_TOKENS
    if not most or any(inputs.get(name) is not None for name in NOT_TEXT):
        return [(inputs, mask)]
    chosen = passes(inputs["prompt_ids"], inputs["prompt_mask"], mask, most)
    if len(chosen) == 1:
        return [(inputs, mask)]
    return [(_rows(inputs, len(mask), index), mask[index]) for index in chosen]


def split_rows(
    inputs: dict[str, Any], mask: Bool[Tensor, "B T"], most: int | None, per_row: int
) -> list[tuple[dict[str, Any], Bool[Tensor, "B T"]]]:
    """`split` where every row costs as much, `per_row` tokens, whatever its prompt and its response are."""
    if most is None:
        most = CPU_TOKENS if mask.device.type == "cpu" else DEVICE_TOKENS
    size = max(1, most // per_row) if most else len(mask)
    if size >= len(mask):
        return [(inputs, mask)]
    chosen = torch.arange(len(mask), device=mask.device).split(size)
    return [(_rows(inputs, len(mask), index), mask[index]) for index in chosen]


def _rows(inputs: dict[str, Any], size: int, index: Int[Tensor, " b"]) -> dict[str, Any]:
    return {k: x[index] if isinstance(x, Tensor) and x.ndim and len(x) == size else x for k, x in inputs.items()}


def is_sharded(kind: DistributedType) -> bool:
    """Whether ranks hold parts of the weights, so that all must run as many passes."""
    return kind not in (
        DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU,
    )  # fmt: skip
