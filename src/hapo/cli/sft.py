"""`hapo sft`: demonstrations in, a run folder with records, checkpoints, held-out loss, accuracy and model out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import get_quantization_config

from ..insight.run import Run
from ..tasks.demonstration_sets import DemonstrationConfig, DemonstrationSet, load_demonstrations
from ..trl import SupervisedConfig, SupervisedTrainer
from . import INTERRUPTED
from .held_out import Course, HeldOut
from .model import AdaptedModelConfig
from .recipe import RecipeParser, told
from .run_folder import (
    add_resume,
    check_folder,
    check_same_data,
    is_finished,
    model_options,
    model_path,
    prepare_process,
    prolong,
    resumed,
    run_training,
    save_model,
    take_up_last,
    write_page,
)

DESCRIPTION = """Train a model on demonstrations with a supervised method. Flags: those of the data, of TRL's
SFTConfig with a method, and of TRL's ModelConfig. Without --config or --model: an embedded example."""


@dataclass
class SftOptions:
    """What `hapo sft` takes beside data, trainer and model."""

    evaluate: bool = field(
        default=True,
        metadata={
            "help": "measure held-out loss, and accuracy where the data have answers, before and after training"
        },
    )
    evaluate_every: int | None = field(
        default=None, metadata={"help": "optimiser steps between further measurements during training"}
    )
    evaluate_samples: int = field(
        default=1, metadata={"help": "sampled answers to each held-out problem, which are averaged"}
    )
    temperature: float = field(default=1.0, metadata={"help": "at which held-out answers are sampled"})
    max_completion_length: int = field(default=256, metadata={"help": "limit of held-out answers, tokens"})
    report: bool = field(default=True, metadata={"help": "write report.html into the run folder at the end"})
    threads: int | None = field(
        default=None,
        metadata={"help": "CPU threads of torch (default: torch's); the last bits of results depend on it"},
    )

    top_p, top_k, reward_weights, chat_template_kwargs = 1.0, 0, None, None  # not annotated: no flags

    def __post_init__(self) -> None:
        for name in ("threads", "evaluate_every", "evaluate_samples", "max_completion_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}; greedy is measured besides")


def main(argv: list[str]) -> int:
    """Train, and return the exit code."""
    argv, checkpoint = resumed(argv)
    if checkpoint is True and is_finished("sft", argv):
        return 0
    kinds = [DemonstrationConfig, SupervisedConfig, AdaptedModelConfig, SftOptions]
    parser = RecipeParser("hapo sft", DESCRIPTION, kinds, default="sft")
    add_resume(parser)
    parser.set_defaults(run_records=True)
    data_config, args, model_config, options, _ = parser.read(argv)
    check_folder("sft", args, model_config, resuming=checkpoint is not None)
    console = Console(quiet=args.process_index != 0, highlight=False, markup=False)
    prepare_process(options.threads)
    data = load_demonstrations(data_config, seed=args.seed)
    folder = Path(args.output_dir)
    check_same_data(
        data.name,
        data.train._fingerprint,
        gather_object([data.fingerprint]),
        Run(folder).manifest if checkpoint else {},
    )
    trainer = build_trainer(data, args, model_config)
    trainer.recipe = told(data_config, model_config, options)
    console.print(
        f"{trainer.method.name} on {data.name}: {len(data.train)} demonstrations to train on, "
        f"{len(data.eval)} held out; run folder {args.output_dir}",
        soft_wrap=True,
    )
    course = Course(folder, None, fresh=checkpoint is None)
    callbacks: list[TrainerCallback] = [course]
    held_out = None
    if options.evaluate:
        callbacks.append(HeldOutLoss(trainer, course, options.evaluate_every))
    if options.evaluate and data.problems is not None:
        every, samples = options.evaluate_every, options.evaluate_samples
        held_out = HeldOut(
            trainer,
            data.problems,
            data.reward_funcs,
            course,
            console,
            every=every,
            samples=samples,
            settings=options,
        )
        callbacks.append(held_out)
        if checkpoint is None:
            held_out.measure(0)
    if checkpoint is not None and args.process_index == 0:
        prolong(folder / "config.yaml", args.max_steps)
    finished = checkpoint is not None and take_up_last(trainer, course, checkpoint)
    if not finished:
        finished = run_training("sft", trainer, checkpoint, console, callbacks)
    if finished:
        save_model(trainer, folder / "model")
        if held_out is not None:
            held_out.measure(trainer.state.global_step)
            held_out.print()
        trainer.create_model_card(weights="model")
        if args.process_index == 0:
            course.finish(trainer.state)
        _print_loss(folder, console)
        console.print(f"model: {folder / 'model'}", soft_wrap=True)
    if options.report and args.process_index == 0:
        write_page(folder, console)
    trainer.accelerator.wait_for_everyone()  # gloo aborts a rank whose peer has gone
    trainer.accelerator.end_training()
    return 0 if finished else INTERRUPTED


def build_trainer(
    data: DemonstrationSet, args: SupervisedConfig, model_config: AdaptedModelConfig
) -> SupervisedTrainer:
    """The trainer of some demonstrations, its model loaded as the options say."""
    given = args.model_init_kwargs
    args.model_init_kwargs = model_options(model_config, given)
    trainer = SupervisedTrainer(
        model_path(model_config),
        args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        quantization_config=get_quantization_config(model_config),
        peft_config=model_config.adapter(),
    )
    trainer.args.model_init_kwargs = given  # the run's config.yaml has them under the names that the user gave
    return trainer


class HeldOutLoss(TrainerCallback):
    """Loss on the held-out demonstrations before training, every so many steps and after the last one.

    Its lines go to metrics.jsonl. Training does not depend on whether it is measured, nor does the clock.
    """

    def __init__(self, trainer: SupervisedTrainer, course: Course, every: int | None) -> None:
        self.trainer, self.course, self.every = trainer, course, every

    def measure(self) -> None:
        """Measure, and log."""
        with self.course.paused(), torch.random.fork_rng():
            self.trainer.evaluate()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the first step; a resumed run has measured it."""
        if state.global_step == 0:
            self.measure()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the last step, and every so many."""
        last = state.global_step >= state.max_steps
        if last or (self.every is not None and state.global_step % self.every == 0):
            self.measure()


def _print_loss(folder: Path, console: Console) -> None:
    losses = Run(folder).held_out_loss()
    if len(losses) > 1:
        first, last = losses["eval_loss"].iloc[0], losses["eval_loss"].iloc[-1]
        console.print(f"held-out loss: {first:.4f} before, {last:.4f} after, nats per target")
