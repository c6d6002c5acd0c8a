"""Where the Triton kernels act; what they compute is tested in tests_vllm and tests_gpu."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from hapo import kernels


def tensor_on(device: str, dtype: torch.dtype) -> SimpleNamespace:
    return SimpleNamespace(is_cuda=device == "cuda", element_size=torch.empty(0, dtype=dtype).element_size)


@pytest.mark.parametrize(
    ("device", "dtype", "triton", "environment", "use"),
    [
        ("cuda", torch.float32, True, None, True),
        ("cuda", torch.bfloat16, True, "1", True),
        ("cuda", torch.float64, True, None, False),
        ("cpu", torch.float32, True, None, False),
        ("cuda", torch.float32, False, None, False),
        ("cuda", torch.float32, True, "0", False),
    ],
)
def test_kernels_act_on_cuda_unless_turned_off(monkeypatch, device, dtype, triton, environment, use):
    kernels._wanted.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
    monkeypatch.delenv("HAPO_TRITON", raising=False)
    if environment is not None:
        monkeypatch.setenv("HAPO_TRITON", environment)
    assert kernels.use_triton(tensor_on(device, dtype)) is use
    kernels._wanted.cache_clear()
