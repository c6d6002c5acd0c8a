"""What a run shows and how it is stopped: progress bars, one readable line, Ctrl-C."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LINE_EVERY = 5.0
"""Least seconds between two lines where the output is no terminal."""


class TrainingProgress(TrainerCallback):
    """A bar and a live line on a terminal; elsewhere a line every few seconds. Close it after training.

    Args:
        console: where to; a quiet one shows nothing.
        binary: whether the rewards of the last rollout are all 0 or 1, so that their mean is an accuracy.
    """

    def __init__(self, console: Console, binary: Callable[[], bool]) -> None:
        self._console = console
        self._binary = binary
        self._latest: dict[str, Any] = {}
        self._shown = -LINE_EVERY
        self._rate = 0.0
        self._mark = (0.0, 0)
        self._bar = _bar(console)
        self._line = Text("")
        self._live = Live(Group(self._bar, self._line), console=console, auto_refresh=console.is_terminal)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and the bar, at the step of a resumed run."""
        self._mark = (time.monotonic(), state.num_input_tokens_seen)
        self._task = self._bar.add_task("train", total=state.max_steps, completed=state.global_step)
        if self._console.is_terminal and not args.disable_tqdm:
            self._live.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show what was logged; what this step did not log (a rollout serves several) stays as it was."""
        logs = logs or {}
        if "loss" not in logs:
            return
        self._latest.update({k: v for k, v in logs.items() if v is not None})
        now, tokens = time.monotonic(), state.num_input_tokens_seen
        if tokens > self._mark[1]:
            self._rate = (tokens - self._mark[1]) / max(now - self._mark[0], 1e-9)
            self._mark = (now, tokens)
        line = describe(self._latest, self._rate, self._binary())
        if self._live.is_started:
            self._line.plain = line
        elif now - self._shown >= LINE_EVERY or state.global_step == state.max_steps:
            self._shown = now
            self._console.print(f"step {state.global_step}/{state.max_steps}  {line}", soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._live.stop()


def describe(metrics: dict[str, Any], tokens_per_second: float, binary: bool) -> str:
    """One line: reward, accuracy where rewards are 0 or 1, entropy (nats), length, clip shares, tokens/s.

    Where there is no reward: the loss, nats per target.
    """
    parts = []
    if "reward" not in metrics and "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.4f}")
    if "reward" in metrics:
        parts.append(f"reward {metrics['reward']:.3f}")
        if binary:
            parts.append(f"accuracy {100 * metrics['reward']:.1f} %")
    if "entropy" in metrics:
        parts.append(f"entropy {metrics['entropy']:.3f}")
    if "completions/mean_length" in metrics:
        parts.append(f"length {metrics['completions/mean_length']:.1f}")
    if "clip_ratio/low_mean" in metrics:
        low, high = metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"]
        parts.append(f"clipped low {100 * low:.2f} % high {100 * high:.2f} %")
    if tokens_per_second:
        parts.append(f"{tokens_per_second:,.0f} tokens/s")
    return "  ".join(parts)


class Interrupt(TrainerCallback):
    """Context in which Ctrl-C and SIGTERM end training after the current optimiser step, with a checkpoint.

    A second one raises KeyboardInterrupt at once. With several processes one signalled process stops all.
    """

    def __init__(self, console: Console) -> None:
        self.caught = False
        self._console = console
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop, if any process was asked to."""
        if args.world_size > 1:
            asked = torch.tensor(int(self.caught), device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.caught = bool(asked)
        if self.caught:
            control.should_save = control.should_training_stop = True

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.caught = True
        for number_ in self._before:
            signal.signal(number_, signal.default_int_handler)
        self._console.print("\nfinishing this optimiser step, then saving; once more stops at once")


@contextmanager
def counting(console: Console, what: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, nothing elsewhere; gives the function that moves it."""
    with _bar(console) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
