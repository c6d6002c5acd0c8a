"""The keys and values of a generation: which cache holds them, and layers that grow without a copy at every token.

Shapes: B rows, H heads, L tokens that are held, n new ones, W and V widths of a key and of a value.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

LEAST_ROOM = 32
"""Tokens."""
MORE = 8
"""A layer that is full gets room for L / MORE more tokens, and for LEAST_ROOM at least."""


def cache_of(model_kwargs: dict[str, Any]) -> Any:
    """The cache of keys and values among these arguments: past_key_values, since transformers 5.24 cache."""
    return next((x for x in model_kwargs.values() if isinstance(x, Cache)), None)


def rows_can_move(cache: Any) -> bool:
    """Whether rows of this cache can be repeated and dropped: attention alone, kept in tensors that grow."""
    layers = {type(layer) for layer in getattr(cache, "layers", [None])}
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and layers <= {DynamicLayer, RoomyLayer, DynamicSlidingWindowLayer}
    )


class RoomyLayer(DynamicLayer):
    """The same keys and values as transformers' own layer, with room for those that come.

    `keys` (B,H,L,W) and `values` (B,H,L,V) are the first L tokens of wider tensors, into whose rest new ones are
    written. transformers' layer makes both anew for every token, which is a copy of all that it holds. So does
    this one where gradients are on, under torch.compile, and for states of another shape or dtype.
    """

    keys: Any
    values: Any
    _wide: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Float[Tensor, "B H n W"], value_states: Float[Tensor, "B H n V"], *args: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Add them, and give all."""
        states = key_states, value_states
        if not self._can_take(states):
            self._wide = None
            return super().update(*states, *args, **more)
        held = self.keys, self.values
        length = self.keys.shape[-2]
        end = length + key_states.shape[-2]
        if self._wide is None or not _holds(self._wide, held, end):
            self._wide = _widened(self.keys, end), _widened(self.values, end)
        for wide, new in zip(self._wide, states, strict=True):
            wide[..., length:end, :] = new
        self.keys, self.values = (wide[..., :end, :] for wide in self._wide)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, and no memory of the others."""
        self._wide = None
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat the rows."""
        self._wide = None
        super().batch_repeat_interleave(repeats)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows in another order."""
        self._wide = None
        super().reorder_cache(beam_idx)

    def reset(self) -> None:
        """Hold nothing."""
        self._wide = None
        super().reset()

    def _can_take(self, states: tuple[Tensor, Tensor]) -> bool:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.get_seq_length() == 0:
            return False
        return all(
            x.dtype == held.dtype and x.shape[:-2] == held.shape[:-2] and x.shape[-1] == held.shape[-1]
            for x, held in zip(states, (self.keys, self.values), strict=True)
        )


def _holds(wide: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], end: int) -> bool:
    """Whether what is held still lies in the wide tensors, with room: somebody may have set other keys."""
    return all(
        w.data_ptr() == x.data_ptr() and w.stride() == x.stride() and len(w) == len(x) and w.shape[-2] >= end
        for w, x in zip(wide, held, strict=True)
    )


def _widened(x: Tensor, end: int) -> Tensor:
    wide = x.new_empty((*x.shape[:-2], end + max(LEAST_ROOM, end // MORE), x.shape[-1]))
    wide[..., : x.shape[-2], :] = x
    return wide


def give_room(model_kwargs: dict[str, Any]) -> None:
    """Let the empty layers of the cache among these arguments grow in place, where they would be copied.

    Numbers do not change; an eighth more memory is held, 32 tokens a row at least. Sliding windows, static,
    quantised and offloaded caches stay as they are.
    """
    cache = cache_of(model_kwargs)
    if type(cache) is not DynamicCache or cache.offloading:
        return
    empty = [type(layer) is DynamicLayer and not layer.is_initialized for layer in cache.layers]
    cache.layers = [RoomyLayer() if e else layer for e, layer in zip(empty, cache.layers, strict=True)]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = RoomyLayer
