"""Shared set-up: jaxtyping shapes are enforced at every call while the tests run."""

import functools
import os
from collections.abc import Iterator

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
from jaxtyping import install_import_hook

TENSOR_CODE = ["hapo.batch", "hapo.method", "hapo.methods", "hapo.parts", "hapo.samplers", "hapo.scoring"]
install_import_hook(TENSOR_CODE, "beartype.beartype")

import torch  # noqa: E402

import hapo.tasks.rewards  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def one_verifier_process() -> Iterator[None]:
    """Rewards by math-verify share a process, since starting one takes seconds; `Judge` itself does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hapo.tasks.rewards, "Judge", functools.cache(hapo.tasks.rewards.Judge))
        yield
