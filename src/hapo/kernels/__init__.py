"""Triton kernels. Importing their modules needs triton; the torch paths that they replace agree to rounding."""

from __future__ import annotations

import functools
import importlib.util
import os

from torch import Tensor


def use_triton(like: Tensor) -> bool:
    """Whether the kernels act on this tensor: on CUDA, not in float64, and where there is Triton.

    HAPO_TRITON=0 in the environment turns them off; it is read once a process.
    """
    return like.is_cuda and like.element_size() < 8 and _wanted()


@functools.cache
def _wanted() -> bool:
    return os.environ.get("HAPO_TRITON") != "0" and importlib.util.find_spec("triton") is not None
