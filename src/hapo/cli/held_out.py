"""Held-out accuracy along a run, its token budget, and what is left when it ends."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from filelock import FileLock
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..engines.estimate import Estimate
from ..engines.records import append_line
from ..insight.finding import counted
from ..outputs import write_whole
from ..tasks.rewards import RewardFunction
from .measure import Answer, Decoding, draw_answers, estimate
from .progress import counting


class Course(TrainerCallback):
    """How long a run has trained, and when its tokens are spent.

    Args:
        folder: the run's.
        token_budget: training ends with the rollout batch that reaches it, when its last optimiser step is done.
        fresh: the run begins; it is not resumed.
        clock: seconds since any moment; by default those that pass.
    """

    def __init__(
        self,
        folder: Path,
        token_budget: int | None,
        fresh: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.folder, self.token_budget, self.fresh, self.clock = folder, token_budget, fresh, clock
        self._why = "max_steps"
        self._before = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Training seconds without measurements, those before a resumed checkpoint included."""
        return self._before + (0.0 if self._since is None else self.clock() - self._since)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is in no count of the run's time."""
        runs, self._before, self._since = self._since is not None, self.seconds, None
        yield
        self._since = self.clock() if runs else None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the clock."""
        file = self._clock_of(state)
        self._before = json.loads(file.read_text())["seconds"] if file.is_file() and not self.fresh else 0.0
        self._since = self.clock()

    def is_spent(self, state: TrainerState) -> bool:
        """Whether the token budget ended the run in this state."""
        return self.token_budget is not None and state.num_input_tokens_seen >= self.token_budget

    def take_up(self, state: TrainerState) -> None:
        """The clock, and why the run ended, of a run that was over in this state."""
        file = self._clock_of(state)
        self._before = json.loads(file.read_text())["seconds"] if file.is_file() else 0.0
        if self.is_spent(state):
            self._why = "token_budget"

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the clock's time in the checkpoint."""
        file = self._clock_of(state)
        if state.is_world_process_zero and file.parent.is_dir():
            write_whole(file, json.dumps({"seconds": self.seconds}) + "\n")

    def _clock_of(self, state: TrainerState) -> Path:
        return self.folder / "checkpoints" / f"checkpoint-{state.global_step}" / "hapo_clock.json"

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop, if the budget is spent."""
        if not self.is_spent(state):
            return
        updates = args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps
        if state.global_step % updates == 0:
            self._why, control.should_training_stop = "token_budget", True

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        self._before, self._since = self.seconds, None

    def finish(self, state: TrainerState) -> None:
        """Write finished.json: the run is complete."""
        end = {"steps": state.global_step, "num_tokens": state.num_input_tokens_seen}
        end |= {"seconds": round(self.seconds, 3), "why": self._why}
        write_whole(self.folder / "finished.json", json.dumps(end, indent=2) + "\n")


class HeldOut(TrainerCallback):
    """Greedy and sampled accuracy on held-out problems, written to the run's evaluations.jsonl.

    Works on any trainer of TRL that generates text. Training does not depend on whether it is measured, and the
    time that measuring takes is in no count of the run's.

    Args:
        trainer: whose model is measured.
        problems: with the columns that the rewards ask for.
        rewards: as the trainer's.
        course: whose clock stands still meanwhile.
        console: where progress and the table go.
        every: optimiser steps between measurements during training; None: only when `measure` is called.
        samples: sampled answers to each problem, which are averaged.
        settings: what has temperature, top_p, top_k, max_completion_length, reward_weights and
            chat_template_kwargs; the trainer's args, unless told.
        answer: what `draw_answers` does, or as it does.

    Raises:
        ValueError: DeepSpeed or FSDP, which hold no whole model on a device.
    """

    def __init__(
        self,
        trainer: Any,
        problems: Dataset,
        rewards: list[RewardFunction],
        course: Course,
        console: Console,
        *,
        every: int | None,
        samples: int,
        settings: Any = None,
        answer: Callable[..., list[Answer]] = draw_answers,
    ) -> None:
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ValueError(
                "held-out accuracy is measured with a whole model on each device, which DeepSpeed and FSDP split: "
                "set evaluate to false, and measure with `hapo eval` afterwards"
            )
        self.trainer, self.problems, self.rewards, self.console = trainer, problems, rewards, console
        self.settings = trainer.args if settings is None else settings
        self.answer = answer
        self.course, self.every, self.samples = course, every, samples
        self.file = Path(trainer.args.output_dir) / "evaluations.jsonl"
        told = [{line["step"] for line in read_lines(self.file)}]
        self._measured: set[int] = broadcast_object_list(told)[0]

    def measure(self, step: int) -> None:
        """Measure after optimiser step `step` and append, on all processes; not twice at the same step."""
        if step in self._measured:
            return
        self._measured.add(step)
        args, how_to, started = self.trainer.args, self.settings, time.monotonic()
        sampling = {"temperature": how_to.temperature, "top_p": how_to.top_p, "top_k": how_to.top_k}
        sampling["samples"] = self.samples
        clock = getattr(self.trainer, "clock", None)  # of the engine's phases
        with self.course.paused(), clock.pause() if clock else nullcontext():
            found = {
                "greedy": self._estimate(f"step {step}, greedy"),
                "sampled": self._estimate(f"step {step}, sampled", **sampling),
            }
        if args.process_index == 0:
            for how, values in found.items():
                line = {"step": step, "num_tokens": self.trainer.state.num_input_tokens_seen}
                took = {"took": round(time.monotonic() - started, 1)}
                append_line(
                    self.file, {**line, "seconds": round(self.course.seconds, 3), "how": how, **values, **took}
                )

    def measure_start(self, kept: Path) -> None:
        """`measure(0)`, its lines left in a file for runs that begin alike; or the lines that one of them left.

        Of a run with one process. Of runs that begin together one measures, and the others wait for it.
        """
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(kept.with_suffix(".lock")):
            lines = read_lines(kept)
            if [line["how"] for line in lines] != ["greedy", "sampled"]:
                self.measure(0)
                write_whole(kept, "".join(json.dumps(line) + "\n" for line in read_lines(self.file)))
                return
        self._measured.add(0)
        for line in lines:
            append_line(self.file, {**line, "took": 0.0})
        with self.course.paused():  # what a first generation takes longer is in no count of the run's time either
            self._estimate("first answers", self.problems.select(range(1)))

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What was measured after the checkpoint of a resumed run is taken back with its records."""
        self._measured = {step for step in self._measured if step <= state.global_step}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure, every so many steps."""
        if self.every is not None and state.global_step % self.every == 0:
            self.measure(state.global_step)

    def print(self) -> None:
        """The table: before, after, and the change."""
        lines = read_lines(self.file)
        table = Table(box=box.SIMPLE)
        for column in ("held out", "before", "after", "change"):
            table.add_column(column, no_wrap=True)
        for how in ("greedy", "sampled"):
            first, last = ([Estimate.of(line) for line in lines if line["how"] == how][i] for i in (0, -1))
            change = last.mean - first.mean
            shown = f"{100 * change:+.1f} points" if first.binary and last.binary else f"{change:+.3f}"
            table.add_row(how, str(first), str(last), shown)
        self.console.print(table)
        self.console.print(
            f"{counted(last.problems, 'problem')}, 95 % intervals; sampled at temperature "
            f"{self.settings.temperature:g}"
        )

    def _estimate(self, what: str, problems: Dataset | None = None, **sampling: Any) -> dict[str, Any]:
        trainer, args = self.trainer, self.trainer.args
        problems = self.problems if problems is None else problems
        first, every = args.process_index, args.world_size
        mine = problems.select(range(first, len(problems), every))
        decoding = Decoding(
            max_new_tokens=self.settings.max_completion_length,
            batch_size=args.per_device_eval_batch_size,
            seed=args.seed + args.process_index,
            **sampling,
        )
        with counting(self.console, what, len(mine) * decoding.samples) as advance:
            answers = self.answer(
                trainer.accelerator.unwrap_model(trainer.model),
                trainer.processing_class,
                mine,
                self.rewards,
                decoding,
                weights=self.settings.reward_weights,
                chat_template_kwargs=self.settings.chat_template_kwargs,
                draw=getattr(trainer, "draw_responses", None),
                advance=advance,
            )
        everyone: list[Answer] = gather_object([replace(a, problem=first + every * a.problem) for a in answers])
        scores = torch.zeros(len(problems), dtype=torch.float64)
        scores.index_add_(
            0,
            torch.tensor([answer.problem for answer in everyone]),
            torch.tensor([answer.score for answer in everyone], dtype=torch.float64),
        )
        return {**estimate(everyone).to_dict(), "scores": (scores / decoding.samples).round(decimals=6).tolist()}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, without a last line that a kill cut short; none where it does not exist."""
    whole, _, _ = file.read_text().rpartition("\n") if file.is_file() else ("", "", "")
    return [json.loads(line) for line in whole.splitlines()]
