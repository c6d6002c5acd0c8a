"""What TRL's asynchronous trainer asks of a GPU, on a machine without one.

It asks for the GPU's name, for one of its metrics, and attends over its tree of packed samples by a FlashAttention
3 kernel; here the metric is left out, and the attention is plain torch. Nothing of TRL's stays changed.

Shapes: N packed tokens, S segments, K entries of the segments' paths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from trl.experimental.async_grpo import async_grpo_trainer

NAME = "hapo_tree"
"""Under which transformers knows it."""


@contextmanager
def no_gpu_asked() -> Iterator[None]:
    """While a trainer of TRL's is made: without CUDA it has no peak FLOPs, where TRL's code would raise."""
    asked = async_grpo_trainer.get_peak_flops_per_device
    if not torch.cuda.is_available():
        async_grpo_trainer.get_peak_flops_per_device = lambda *_: None
    try:
        yield
    finally:
        async_grpo_trainer.get_peak_flops_per_device = asked


def take_plain_attention(model: PreTrainedModel) -> None:
    """Let a model that TRL loaded for its tree attention run without the kernel, with the same numbers.

    Raises:
        ValueError: the model caps its attention logits, which plain attention has not.
    """
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        raise ValueError(
            f"{type(model).__name__} caps its attention logits, which needs TRL's kernel: train it on a GPU, or "
            "take another model"
        )
    AttentionInterface.register(NAME, plain_tree_attention)
    AttentionMaskInterface.register(NAME, lambda **_: None)
    model.set_attn_implementation(NAME)


def plain_tree_attention(
    module: nn.Module,
    query: Float[Tensor, "1 H N D"],
    key: Float[Tensor, "1 G N D"],
    value: Float[Tensor, "1 G N D"],
    attention_mask: None,
    *,
    tree_kv_index: Int[Tensor, " K"],
    tree_cu_seqlens_q: Int[Tensor, " S1"],
    tree_cu_seqlens_k: Int[Tensor, " S1"],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 N H D"], None]:
    """What `trl.experimental.async_grpo.packing.tree_attention` computes, of a dense N x N mask."""
    mask = tree_mask(query.shape[2], tree_kv_index, tree_cu_seqlens_q, tree_cu_seqlens_k, sliding_window)
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2), None


def tree_mask(
    n: int,
    kv_index: Int[Tensor, " K"],
    cu_seqlens_q: Int[Tensor, " S1"],
    cu_seqlens_k: Int[Tensor, " S1"],
    window: int | None = None,
) -> Bool[Tensor, "N N"]:
    """Which token sees which: those on the path from the root to it, itself included.

    Args:
        n: packed tokens. A parent stands before its children.
        kv_index: packed places of the paths of all segments, end to end.
        cu_seqlens_q: where each segment begins, and where the last one ends.
        cu_seqlens_k: where each path begins, and where the last one ends.
        window: a token sees at most so many, itself included; None: all.
    """
    device = kv_index.device
    lengths, paths = cu_seqlens_q.diff().long(), cu_seqlens_k.diff().long()
    segments = torch.arange(len(lengths), device=device)
    on_path = torch.zeros(len(segments), n, dtype=torch.bool, device=device)
    on_path[segments.repeat_interleave(paths), kv_index] = True
    segment, place = segments.repeat_interleave(lengths), torch.arange(n, device=device)
    mask = on_path[segment] & (place <= place.unsqueeze(1))
    if window:
        depth = place - cu_seqlens_q[:-1].long()[segment] + (paths - lengths)[segment]
        mask &= depth.unsqueeze(1) - depth < window
    return mask
