"""Shared set-up: jaxtyping shapes are enforced at every call while the tests run."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from jaxtyping import install_import_hook

TENSOR_CODE = ["hapo.batch", "hapo.method", "hapo.methods", "hapo.parts", "hapo.samplers", "hapo.scoring"]
install_import_hook(TENSOR_CODE, "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(1)
