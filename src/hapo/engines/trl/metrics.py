"""What a `HAPOTrainer` logs beside TRL's own metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from ...batch import TokenBatch
from ...method import LossOutput
from ..metrics import NAMES
from .auxiliary import AuxiliaryLoss


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
    """Adds up the shares of an optimiser step, and logs them once a step.

    Args:
        accelerator: adds up over ranks.
        log: name, value -> a line in TRL's metrics.
    """

    def __init__(self, accelerator: Accelerator, log: Callable[[str, float], None]) -> None:
        self.accelerator = accelerator
        self.log = log
        self._shares: dict[str, Tensor] = {}

    def add(
        self, out: LossOutput, batch: TokenBatch, auxiliary: Sequence[AuxiliaryLoss] = (), *, mixed: bool = False
    ) -> None:
        """One pass's shares: the method's, and those of auxiliary losses before their weights.

        `mixed`: demonstrations are in the loss as well.

        Raises:
            ValueError: two of them have one name.
        """
        assert batch.entropy is not None and batch.totals is not None
        shares = {}
        if batch.totals.tokens:  # a step without a token has a loss of 0 and nothing to average
            shares = {NAMES[k]: v for k, v in out.metrics.items() if k in NAMES}
            shares["entropy"] = torch.where(batch.mask, batch.entropy, 0.0).sum() / batch.totals.tokens
        taken = {"loss", "entropy", *NAMES.values()}
        if auxiliary or mixed:  # under TRL's name: the loss without them
            taken.add("policy_loss")
            shares["policy_loss"] = out.loss.detach().float()
        for name, _, value in auxiliary:
            if name in taken:
                raise ValueError(
                    f"an auxiliary loss has the name {name!r}, which is taken: give it one of its own"
                )
            taken.add(name)
            shares[name] = value.detach().float()
        self.add_shares(shares)

    def add_shares(self, shares: Mapping[str, Tensor]) -> None:
        """Figures that add up over the step; every rank must have the same names."""
        for name, value in shares.items():
            self._shares[name] = self._shares.get(name, torch.zeros_like(value)) + value

    def flush(self) -> None:
        """At the end of the optimiser step: one reduction over ranks."""
        names = sorted(self._shares)
        if not names:
            return
        summed = self.accelerator.reduce(torch.stack([self._shares[n] for n in names]), "sum").tolist()
        for name, value in zip(names, summed, strict=True):
            self.log(name, value)
        self._shares = {}


def times(clock: PhaseClock) -> dict[str, float]:
    """Seconds of the phases, of this process."""
    metrics = {}
    for phase, seconds in clock.seconds().items():
        metrics[f"time/{phase}"] = seconds
    return metrics
