"""Short runs of the asynchronous trainers on samples that are fixed beforehand: no server, no worker process."""

from __future__ import annotations

import queue
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker

from hapo.engines.trl.asynchronous import AsyncHAPOConfig, AsyncHAPOTrainer, WholeGroupSample
from hapo.engines.trl.asynchronous.worker import UNKNOWN
from tests.engines import tiny
from tests.engines.fixed_rollout import Gradients

GROUP = 4
"""Answers of a prompt."""


@cache
def model_folder(base: Path) -> str:
    """The tiny model and its tokenizer, saved: TRL's asynchronous trainer takes a path."""
    folder = base / "tiny"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def group_of(number: int, version: int) -> list[WholeGroupSample]:
    """Four answers to one prompt: lengths 1 to 8, log-probs of an imaginary sampler, some wholly right or wrong."""
    g = torch.Generator().manual_seed(number)
    prompt = tiny.tokenizer()(f"{number % 10}+{number // 10}=")["input_ids"]
    samples = []
    for response in range(GROUP):
        n = int(torch.randint(1, 9, (), generator=g))
        ids = [*prompt, *torch.randint(2, len(tiny.ALPHABET) + 2, (n,), generator=g).tolist()]
        drawn = np.arange(len(ids)) >= len(prompt)
        logps = np.where(drawn, -1.6 - 1.5 * torch.rand(len(ids), generator=g).numpy(), 0.0)
        reward = float(torch.rand((), generator=g) < 0.5) if number % 3 else 1.0
        versions = np.where(drawn, version - (np.arange(len(ids)) < len(prompt) + 2), UNKNOWN)
        samples.append(sample_of(number, response, GROUP, ids, drawn, logps, reward, versions, version))
    return samples


def sample_of(
    group: int,
    response: int,
    rows: int,
    ids: Any,
    mask: Any,
    logps: Any,
    reward: float,
    versions: Any,
    version: int,
) -> WholeGroupSample:
    return WholeGroupSample(
        prompt=[],
        completion=[],
        input_ids=np.asarray(ids, dtype=np.int64),
        completion_mask=np.asarray(mask, dtype=np.int64),
        old_log_probs=np.asarray(logps, dtype=np.float32),
        advantage=0.0,
        model_version=version,
        group_id=group,
        metrics={"reward": reward, "reward_std": 0.0, "rewards/right": reward},
        response=response,
        of_group=rows,
        versions=np.asarray(versions, dtype=np.int64),
    )


class Endless:
    """A queue whose next group is made when it is asked for, with the version of then."""

    def __init__(self, worker: FixedWorker) -> None:
        self.worker = worker
        self.waiting: list[Any] = []

    def get(self, timeout: float | None = None) -> Any:
        if not self.waiting:
            self.waiting = self.worker.make()
        return self.waiting.pop(0)

    def qsize(self) -> int:
        return len(self.waiting)


class FixedWorker(AsyncRolloutWorker):
    """In the place of TRL's worker, as TRL sees it: groups that depend on their number alone, in order."""

    def __init__(self, make: Any = group_of) -> None:
        self._loop_kwargs: dict[str, Any] = {"dataset_start_index": 0}
        self.rollout_buffer = Endless(self)
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        self._make, self._next, self._version = make, 0, 0

    def make(self) -> list[Any]:
        self._next += 1
        start = self._loop_kwargs["dataset_start_index"]
        samples = self._make(start + self._next - 1, self._version)
        for sample in samples:
            sample.group_id -= start  # TRL's worker counts anew after a resume
        return samples

    def update_model_version(self, model_version: int) -> None:
        self._version = model_version

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def check_health(self, stale_after_s: float) -> None: ...


class NoTransfer:
    """Weights that go nowhere."""

    def init_weight_transfer(self) -> None: ...

    def pause(self) -> None: ...

    def send_weights(self, iterator: Any) -> None: ...

    def resume(self) -> None: ...

    def destroy(self) -> None: ...


def options(folder: Path, **more: Any) -> dict[str, Any]:
    """What TRL's config and ours take."""
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "per_device_train_batch_size": 16,
        "num_generations": GROUP,
        "max_completion_length": 8,
        "max_steps": 2,
        "save_strategy": "no",
        "learning_rate": 0.005,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "disable_tqdm": True,
        "seed": 7,
    }
    return given | more


def trainer(
    base: Path, folder: Path, worker: Any = None, method_object: Any = None, **more: Any
) -> AsyncHAPOTrainer:
    return AsyncHAPOTrainer(
        model_folder(base),
        tiny.count_digits,
        AsyncHAPOConfig(**options(folder, **more)),
        train_dataset=tiny.data(),
        rollout_worker=FixedWorker() if worker is None else worker,
        weight_transfer=NoTransfer(),
        method=method_object,
    )


def run(base: Path, folder: Path, **more: Any) -> tuple[Gradients, AsyncHAPOTrainer]:
    keep, made = Gradients(), trainer(base, folder, **more)
    made.add_callback(keep)
    made.train()
    return keep, made
