"""Shared set-up: jaxtyping shapes are enforced at every call while the tests run."""

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
from jaxtyping import install_import_hook

TENSOR_CODE = [
    *(
        "hapo.adapters",
        "hapo.batch",
        "hapo.head",
        "hapo.method",
        "hapo.methods",
        "hapo.parts",
        "hapo.samplers",
        "hapo.scoring",
    ),
    "hapo.supervised",
]
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


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two_ranks.py left. The tests that ask for it are one xdist group, so that one worker runs it, once."""
    folder = tmp_path_factory.mktemp("two_ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, "--module", "tests.two_ranks", str(folder)],  # as a script it would take tests/vllm for vLLM
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    (folder / "stdout.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder
