"""Triton kernels, opt-in by HAPO_TRITON=1. Importing their modules needs triton; torch agrees to rounding.

No GPU has run them yet (docs/performance.md), so torch is the default, and each kernel is compared with torch at
its first use.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

VARIABLE = "HAPO_TRITON"
ROWS = 4

ABSOLUTE = 1e-4
"""Nats, or shares of a row's largest entry, that a kernel may differ from torch by.

A sum over 2**18 tokens in float32 makes about 18 roundings of 2**-24 in a row, exp2 and log2 a few more on a GPU:
30 roundings of at most ln(2**18) = 12.5 nats are 2e-5. Five times that leaves room; a lost block or a wrong mask
is far outside.
"""

RELATIVE = 1e-6
"""Eight roundings of float32 on top, for logits far from 0."""

_compared: set[Hashable] = set()


def use_triton(like: Tensor) -> bool:
    """Whether the kernels act on this tensor: where HAPO_TRITON=1, on CUDA, and not in float64.

    Raises:
        ValueError: HAPO_TRITON is neither 0 nor 1; on every device, so that a slip is seen before a GPU is.
        ImportError: the kernels would act, and there is no Triton.
    """
    if not (_wanted() and like.is_cuda and like.element_size() < 8):
        return False
    if not _installed():
        raise ImportError(
            f"{VARIABLE}=1 asks for the Triton kernels, and triton is not installed: install it (`pip install "
            f"triton`), or unset {VARIABLE} to compute in torch"
        )
    return True


@functools.cache
def _wanted() -> bool:
    value = os.environ.get(VARIABLE, "0")
    if value not in ("0", "1"):
        raise ValueError(
            f"{VARIABLE} is {value!r}: set it to 1 for the Triton kernels on CUDA, to 0 or not at all for torch"
        )
    return value == "1"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.no_grad()
def checked(
    kernel: str,
    launch: Callable[[], None],
    found: Callable[[slice], tuple[Tensor, ...]],
    expected: Callable[[slice], tuple[Tensor, ...]],
    rows: int,
    like: Tensor,
    *form: Hashable,
) -> None:
    """Launch a kernel; at its first use in this process compare a few of its rows with torch.

    Up to four rows, spread over all of them. First use is per kernel, device, and what the compiled kernel depends
    on: dtype, width and strides of `like`, and `form`. Triton may compile one source again for another alignment;
    that is not compared again. A comparison in which torch expects nothing but zeros, or NaN, shows nothing: the
    next use is compared too.

    `expected` is called before the launch, for kernels that write in place, and `found` after it. Vectors are in
    nats; a matrix is compared in units of the largest finite entry of each row. No random numbers are drawn, no
    gradient is recorded, and the device is waited for once. That wait is an error while a CUDA graph is captured.
    It does not happen in vLLM, which captures the model's forward pass but calls its sampler, and with it logits
    processors, outside of graphs in both runners. Without rows nothing is launched.

    Raises:
        RuntimeError: kernel and torch differ by more than rounding.
    """
    key = (kernel, like.device, like.dtype, like.shape[-1], like.stride(), form)
    if rows == 0:
        return
    if key in _compared:
        launch()
        return
    step = max(1, -(-(rows - 1) // (ROWS - 1)))
    few = slice((rows - 1) % step, rows, step)  # the last row is among them
    want = [x.float() for x in expected(few)]
    launch()
    far, largest, alive = _difference(found(few), want)
    if far:
        device = torch.cuda.get_device_name(like.device) if like.is_cuda else "no GPU"
        raise RuntimeError(
            f"the Triton kernel {kernel!r} differs from torch by up to {largest:.2g} on {like.device} ({device}), "
            f"for {str(like.dtype).removeprefix('torch.')} logits of {like.shape[-1]} tokens: unset {VARIABLE}, "
            "or set it to 0, to compute in torch, and report this message"
        )
    if alive:
        _compared.add(key)


def _difference(found: tuple[Tensor, ...], want: list[Tensor]) -> tuple[bool, float, bool]:
    """Whether they are further apart than rounding, by how much at most, and whether anything but 0 is wanted."""
    figures = []
    for got, x in zip(found, want, strict=True):
        info = torch.finfo(got.dtype)
        y = got.float()
        same = (y == x) | (y.isnan() & x.isnan())  # -inf is where it was, NaN is handed on
        size = x.abs().nan_to_num(nan=0.0, posinf=0.0)
        unit = size.amax(-1, keepdim=True) if x.ndim == 2 else 1.0
        # What is stored in a half precision is rounded to it, to a multiple of its smallest number near 0.
        allowed = ABSOLUTE * unit + max(RELATIVE, info.eps) * size + info.tiny * info.eps
        apart = torch.where(same, 0.0, (y - x).abs().nan_to_num(nan=torch.inf, posinf=torch.inf))
        figures += [(apart > allowed).any(), apart.max(), (size > 0).any()]
    far, largest, alive = torch.stack([f.float() for f in figures]).reshape(-1, 3).amax(0).tolist()
    return bool(far), largest, bool(alive)
