"""Equal prompts are run once: their keys and values serve all responses to them.

Shapes: B rows, U distinct rows, P prompt columns, T response columns, N valid response tokens, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers.cache_utils import DynamicCache
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from .cache import rows_can_move

WORTH = {"cpu": 5e7}
WORTH_ELSEWHERE = 3e9
"""Tokens saved times weights a layer that pay for a second call of every layer. On a CPU measured: a model of 0.2
M weights a layer lost by saving 150 tokens, one of 3.5 M gained by 500. Elsewhere ours: 0.2 ms of launches."""


def distinct_rows(
    ids: Int[Tensor, "B P"], attention_mask: Int[Tensor, "B P"] | None
) -> tuple[Int[Tensor, " U"], Int[Tensor, " B"]]:
    """One row of each prompt, and for each row which of these it equals; what stands under padding is not read."""
    key = ids if attention_mask is None else torch.where(attention_mask.bool(), ids, -1)
    _, inverse = torch.unique(key, dim=0, return_inverse=True)
    rows = torch.arange(len(ids), device=ids.device)
    first = torch.full_like(rows, len(ids)).scatter_reduce(0, inverse, rows, "amin")
    return first[first < len(ids)], inverse


def response_states(
    model: Any,
    input_ids: Int[Tensor, "B P+T"],
    attention_mask: Int[Tensor, "B P+T"],
    response_mask: Bool[Tensor, "B T"],
    beside: Callable[[], Float[Tensor, "b l M"]] | None = None,
) -> list[Tensor]:
    """Last hidden states (N, D) that predict the valid response tokens, row by row. Differentiable.

    Rows and columns that none of these needs are not run; neither is a prompt that stands in several rows, but
    once. Prompts are padded on the left. `model` is a causal language model of text.

    Args:
        beside: called after each run of the layers, it gives M more values of each position that was run; those of
            the same positions (N, M) are a second entry of the result.
    """
    needed = response_mask.any(1)
    rows = needed.nonzero().squeeze(1)
    if not len(rows):  # the states of no token are still connected to the model
        rows = rows.new_zeros(1)
    ids, attention, mask = input_ids[rows], attention_mask[rows], response_mask[rows]
    width = mask.shape[1]
    padding = attention[:, :-width].cumsum(1).eq(0).all(0).sum().clamp(max=ids.shape[1] - width - 1)
    unused = mask.flip(1).cumsum(1).eq(0).all(0).sum().clamp(max=width - 1)
    left, right = torch.stack([padding, unused]).tolist()
    ids, attention = (x[:, left : x.shape[1] - right] for x in (ids, attention))
    width -= right
    found = _states(model, ids[:, :-1], attention[:, :-1], ids.shape[1] - width, beside)
    return [states[mask[:, :width].to(states.device)] for states in found]


def _one_pass_only(model: Any) -> bool:
    """Checkpointed layers take no cache; ranks that share weights must run them equally often."""
    for module in model.modules():
        if isinstance(module, FSDPModule) or (model.training and getattr(module, "gradient_checkpointing", False)):
            return True
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)


def _states(
    model: Any, ids: Tensor, attention: Tensor, prompt: int, beside: Callable[[], Tensor] | None
) -> list[Tensor]:
    """States (B, T, D) of the last prompt column and of all but the last response column; what is beside them."""
    base = model.base_model

    def run(**inputs: Any) -> list[Tensor]:
        hidden = base(**inputs).last_hidden_state
        return [hidden] if beside is None else [hidden, beside()]

    accepted = inspect.signature(type(base).forward).parameters
    position = {"position_ids": (attention.cumsum(1) - 1).clamp_min(0)} if "position_ids" in accepted else {}
    name = next((name for name in ("cache", "past_key_values") if name in accepted), None)
    if name is not None and not _one_pass_only(model):
        first, of_row = distinct_rows(ids[:, :prompt], attention[:, :prompt])
        cache = DynamicCache(config=model.config)
        saved = (len(ids) - len(first)) * prompt
        layer = sum(p.numel() for p in base.parameters()) / max(model.config.num_hidden_layers, 1)
        worth = saved * layer >= WORTH.get(ids.device.type, WORTH_ELSEWHERE)
        if saved and worth and rows_can_move(cache):
            cached = {name: cache, "use_cache": True}
            part = {key: x[first, :prompt] for key, x in position.items()}
            begun = run(input_ids=ids[first, :prompt], attention_mask=attention[first, :prompt], **part, **cached)
            last = [states[:, -1:][of_row] for states in begun]
            if ids.shape[1] == prompt:
                return last
            cache.batch_select_indices(of_row)
            part = {key: x[:, prompt:] for key, x in position.items()}
            rest = run(input_ids=ids[:, prompt:], attention_mask=attention, **part, **cached)
            return [torch.cat(pair, 1) for pair in zip(last, rest, strict=True)]
    whole = run(input_ids=ids, attention_mask=attention, **position, use_cache=False)
    return [states[:, prompt - 1 :] for states in whole]
