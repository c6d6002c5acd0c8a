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

MOST_REPLAY_GAP = 0.1
"""Mean |old - sampler| in nats that rounding may explain: bfloat16 stays well below, another policy does not."""


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
        self._replayed = False

    def add(self, out: LossOutput, batch: TokenBatch) -> None:
        """One micro-batch's shares; at the end of the optimiser step, one reduction over ranks."""
        trainer = self.trainer
        assert batch.entropy is not None and batch.totals is not None
        if not batch.totals.tokens:
            return  # a step without a token has a loss of 0 and nothing to average
        mode = "train" if trainer.model.training else "eval"
        shares = {NAMES[k]: v for k, v in out.metrics.items() if k in NAMES}
        shares["entropy"] = torch.where(batch.mask, batch.entropy, 0.0).sum() / batch.totals.tokens
        for name, value in shares.items():
            self._shares[name] = self._shares.get(name, torch.zeros_like(value)) + value
        if mode == "train" and not trainer.accelerator.gradient_state.sync_gradients:
            return
        names = sorted(self._shares)
        summed = trainer.accelerator.reduce(torch.stack([self._shares[n] for n in names]), "sum").tolist()
        for name, value in zip(names, summed, strict=True):
            trainer._metrics[mode][name].append(value)
        self._shares = {}

    def add_rollout(self, batch: TokenBatch, scored: Tensor) -> None:
        """Figures of a prepared rollout batch of all ranks; `scored` (B,T) holds dropped groups too.

        Raises:
            RuntimeError: generation and scoring disagree where the sampler is the policy itself.
        """
        trainer = self.trainer
        figures = rollout_metrics(batch, scored, trainer.method.factor, trainer._sampled_with, trainer.temperature)
        gap = sampler_gap(batch)
        if not trainer.use_vllm:  # with vLLM, TRL logs the same
            figures |= gap
        for name, value in figures.items():
            trainer._metrics["train"][name].append(value)
        if gap:
            self._check_replay(gap["sampling/sampling_logp_difference/mean"])

    def add_times(self) -> None:
        """Seconds of the phases, of this process."""
        for phase, seconds in self.clock.seconds().items():
            self.trainer._metrics["train"][f"time/{phase}"].append(seconds)

    def _check_replay(self, gap: float) -> None:
        """Where the sampler is the policy itself, generation and scoring must agree: checked once.

        It finds architectures whose logits hapo.scoring does not reproduce.
        """
        trainer = self.trainer
        plain = trainer.top_p == 1.0 and not trainer.top_k and trainer.min_p is None
        plain = plain and trainer.repetition_penalty == 1.0 and not trainer.args.generation_kwargs
        ours = not trainer.use_vllm and trainer.rollout_func is None
        net = trainer.accelerator.unwrap_model(trainer.model)
        if self._replayed or _drops_out(net) or trainer._sampled_with is not None or not (plain and ours):
            return
        self._replayed = True
        if gap > MOST_REPLAY_GAP:
            raise RuntimeError(
                f"generation and scoring disagree about the same policy by {gap:.3f} nats a token: the logits of "
                f"{type(net).__name__} are not what hapo.scoring computes "
                "from its hidden states; please report the architecture"
            )


def _drops_out(model: torch.nn.Module) -> bool:
    """Whether two passes of the model in training mode differ by dropout."""
    modules = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    return modules or getattr(config, "attention_dropout", 0.0) > 0
