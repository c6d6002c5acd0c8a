"""What a `HAPOTrainer` logs beside TRL's own metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...batch import TokenBatch
from ...method import LossOutput
from ..metrics import NAMES, rollout_metrics, sampler_gap


class PhaseClock:
    """Seconds of a rollout batch by phase.

    `generate` and `reward` are what they say, `score` the rest of a rollout (log-probs, entropies, advantages),
    `update` all that lies between two rollouts. On a GPU, work still queued at the end of a phase counts in the
    next that waits for it.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._updates_since: float | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what happens inside to a phase."""
        began = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """One rollout batch, from its prompts to its advantages."""
        began, self._seconds = time.perf_counter(), {}
        if self._updates_since is not None:
            self._seconds["update"] = began - self._updates_since
        yield
        self._updates_since = time.perf_counter()
        spent = sum(self._seconds.get(name, 0.0) for name in ("generate", "reward"))
        self._seconds["score"] = self._updates_since - began - spent

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is no training, such as measuring accuracy."""
        began, seconds = time.perf_counter(), dict(self._seconds)
        yield
        self._seconds = seconds
        if self._updates_since is not None:
            self._updates_since += time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        """Of the last rollout; `update` is of the batch before."""
        return dict(self._seconds)


class MetricLog:
    """Adds up the shares of an optimiser step, and hands them to TRL's metrics once a step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.clock = PhaseClock()
        self._shares: dict[str, Tensor] = {}

    def add(self, out: LossOutput, batch: TokenBatch) -> None:
        """One pass's shares."""
        assert batch.entropy is not None and batch.totals is not None
        if not batch.totals.tokens:
            return  # a step without a token has a loss of 0 and nothing to average
        shares = {NAMES[k]: v for k, v in out.metrics.items() if k in NAMES}
        shares["entropy"] = torch.where(batch.mask, batch.entropy, 0.0).sum() / batch.totals.tokens
        for name, value in shares.items():
            self._shares[name] = self._shares.get(name, torch.zeros_like(value)) + value

    def flush(self) -> None:
        """At the end of the optimiser step: one reduction over ranks."""
        trainer = self.trainer
        mode = "train" if trainer.model.training else "eval"
        names = sorted(self._shares)
        if not names:
            return
        summed = trainer.accelerator.reduce(torch.stack([self._shares[n] for n in names]), "sum").tolist()
        for name, value in zip(names, summed, strict=True):
            trainer._metrics[mode][name].append(value)
        self._shares = {}

    def add_rollout(self, batch: TokenBatch, scored: Tensor) -> None:
        """Figures of a prepared rollout batch of all ranks; `scored` (B,T) holds dropped groups too."""
        trainer = self.trainer
        figures = rollout_metrics(
            batch, scored, trainer.method.temperature_rule, trainer._sampled_with, trainer.temperature
        )
        if not trainer.use_vllm:  # with vLLM, TRL logs the same
            figures |= sampler_gap(batch)
        for name, value in figures.items():
            trainer._metrics["train"][name].append(value)

    def add_times(self) -> None:
        """Seconds of the phases, of this process."""
        for phase, seconds in self.clock.seconds().items():
            self.trainer._metrics["train"][f"time/{phase}"].append(seconds)
