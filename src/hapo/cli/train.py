"""`hapo train`: a recipe and flags in, a run folder with records, checkpoints, accuracy and model out."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from rich.console import Console
from trl import get_quantization_config

import hapo

from ..engines.trl.arguments import resolve_method
from ..insight.run import Run
from ..loops.options import ETPOConfig
from ..tasks import Task, TaskConfig, load_task
from ..tasks.curriculum import STAGE
from ..tasks.environments.episodes import turn_reward
from ..trl import DiffusionConfig, DiffusionTrainer, EnvironmentRollout, HAPOConfig, HAPOTrainer
from . import INTERRUPTED, UsageError
from .agent import train_agent
from .episodes import answering
from .held_out import Course, HeldOut
from .model import AdaptedModelConfig
from .recipe import DEFAULT, RecipeParser, recipe_of, told
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

DESCRIPTION = """Train a model with verifiable rewards. Flags: those of the task, of TRL's GRPOConfig with a
method, and of TRL's ModelConfig. Without --config or --model: the embedded demo, or that of diffusion models."""


@dataclass
class TrainOptions:
    """What `hapo train` takes beside task, trainer and model."""

    evaluate: bool = field(
        default=True, metadata={"help": "measure accuracy on the held-out problems before and after training"}
    )
    evaluate_every: int | None = field(
        default=None, metadata={"help": "optimiser steps between further measurements during training"}
    )
    evaluate_samples: int = field(
        default=1, metadata={"help": "sampled answers to each held-out problem, which are averaged"}
    )
    token_budget: int | None = field(
        default=None,
        metadata={
            "help": "stop after the rollout batch with which this many prompt and completion tokens are "
            "generated (TRL's num_tokens), if max_steps does not come first"
        },
    )
    report: bool = field(default=True, metadata={"help": "write report.html into the run folder at the end"})
    threads: int | None = field(
        default=None,
        metadata={"help": "CPU threads of torch (default: torch's); the last bits of results depend on it"},
    )

    def __post_init__(self) -> None:
        for name in ("threads", "evaluate_every", "evaluate_samples", "token_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def main(argv: list[str]) -> int:
    """Train, and return the exit code."""
    argv, checkpoint = resumed(argv)
    if checkpoint is True and is_finished("train", argv):
        return 0
    if method_of(argv) == ETPOConfig.method:
        return train_agent(argv, checkpoint)
    kind = config_of(argv)
    kinds: list[type] = [TaskConfig, kind, AdaptedModelConfig, TrainOptions]
    parser = RecipeParser("hapo train", DESCRIPTION, kinds, embedded_for(kind))
    add_resume(parser)
    parser.set_defaults(run_records=True)
    task_config, args, model_config, options, _ = parser.read(argv)
    check_folder("train", args, model_config, resuming=checkpoint is not None)
    console = Console(quiet=args.process_index != 0, highlight=False, markup=False)
    prepare_process(options.threads)
    task = load_task(task_config, seed=args.seed)
    folder = Path(args.output_dir)
    shown = "" if task.demonstrations is None else task.demonstrations._fingerprint
    check_same_data(
        task.name,
        task.train._fingerprint,
        gather_object([task.fingerprint + shown]),
        Run(folder).manifest if checkpoint else {},
    )
    trainer = build_trainer(task, args, model_config)
    trainer.recipe = told(task_config, model_config, options)
    console.print(
        f"{trainer.method.name} on {task.name}: {len(task.train)} problems to train on, "
        f"{len(task.eval)} held out; run folder {args.output_dir}",
        soft_wrap=True,
    )
    course, held_out = Course(folder, options.token_budget, fresh=checkpoint is None), None
    if options.evaluate:
        held_out = HeldOut(
            trainer,
            task.eval,
            task.reward_funcs,
            course,
            console,
            every=options.evaluate_every,
            samples=options.evaluate_samples,
            answer=answering(task),
        )
        if checkpoint is None:
            held_out.measure(0)
    if checkpoint is not None and args.process_index == 0:
        prolong(folder / "config.yaml", args.max_steps)
    finished = checkpoint is not None and take_up_last(trainer, course, checkpoint)
    if not finished:
        callbacks = [course] if held_out is None else [course, held_out]
        finished = run_training("train", trainer, checkpoint, console, callbacks, lambda: _binary(trainer))
    if finished:
        save_model(trainer, folder / "model")
        if held_out is not None:
            held_out.measure(trainer.state.global_step)
            held_out.print()
        trainer.create_model_card(weights="model")
        if args.process_index == 0:
            course.finish(trainer.state)
        console.print(f"model: {folder / 'model'}", soft_wrap=True)
    if options.report and args.process_index == 0:
        write_page(folder, console)
    trainer.accelerator.wait_for_everyone()  # gloo aborts a rank whose peer has gone
    trainer.end()
    return 0 if finished else INTERRUPTED


def build_trainer(task: Task, args: HAPOConfig, model_config: AdaptedModelConfig) -> HAPOTrainer:
    """The trainer of a task, its model loaded as the options say."""
    if task.staged and args.stage_column is None:
        args.stage_column = STAGE
    check_token_reward(task, args)
    if task.token_reward is not None and task.token_reward.options.weights is None:
        raise UsageError(
            f"token_reward has no weights for its channels {', '.join(task.token_reward.options.channels)}: give "
            "shares that add up to 1, or let hapo shape find them"
        )
    given = args.model_init_kwargs
    args.model_init_kwargs = model_options(model_config, given)
    kind = DiffusionTrainer if isinstance(args, DiffusionConfig) else HAPOTrainer
    rewards: list[Any] = task.reward_funcs if task.token_reward is None else [task.token_reward]
    episodes: dict[str, Any] = {}
    if task.environment is not None:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # TRL says of rollout_func that it may change
        episodes = {"rollout_func": EnvironmentRollout(task.environment.make)}
        if resolve_method(None, args).credit is not None:
            rewards = [turn_reward]
    trainer: HAPOTrainer = kind(
        model_path(model_config),
        rewards,
        args,
        train_dataset=task.train,
        eval_dataset=task.eval if args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_config),
        peft_config=model_config.adapter(),
        demonstrations=task.demonstrations,
        **episodes,
    )
    if task.token_reward is not None:
        task.token_reward.prepare(trainer.processing_class, trainer.accelerator.device)
    trainer.args.model_init_kwargs = given  # the run's config.yaml has them under the names that the user gave
    return trainer


def check_token_reward(task: Task, args: HAPOConfig) -> None:
    """Raise a UsageError where options do not go with a reward per token."""
    if task.token_reward is None:
        return
    assert not isinstance(args.method_options, str)
    if (args.method_options or {}).get("advantage") != "token_reward":
        raise UsageError(
            "token_reward gives a reward for each token, and the method compares whole answers: set "
            "method_options to {advantage: token_reward}, or leave token_reward out"
        )
    if args.reward_weights is not None:
        raise UsageError("reward_weights weighs several rewards, and token_reward is the only one: leave it out")


def config_of(argv: list[str]) -> type[HAPOConfig]:
    """The class of the trainer's options: that of the method which flags or recipe name.

    Raises:
        UsageError: there is no such recipe, or it is malformed.
    """
    return config_for(method_of(argv))


def method_of(argv: list[str]) -> str:
    """The method that flags or recipe name.

    Raises:
        UsageError: there is no such recipe, or it is malformed.
    """

    def flag(name: str) -> str | None:
        words = [part for word in argv for part in (word.split("=", 1) if word.startswith(name) else [word])]
        found = [i for i, word in enumerate(words[:-1]) if word == name]
        return words[found[-1] + 1] if found else None

    return str(flag("--method") or recipe_of(flag("--config"), flag("--model")).get("method", HAPOConfig.method))


def config_for(method: str) -> type[HAPOConfig]:
    """The class of the trainer's options for a method; that of most methods where there is no such method."""
    known = method in hapo.methods("policy") and hapo.method(method).likelihood is not None
    return DiffusionConfig if known else HAPOConfig


def embedded_for(kind: type[HAPOConfig]) -> str:
    """Name of the embedded recipe of a class of options."""
    return "diffusion" if issubclass(kind, DiffusionConfig) else DEFAULT


def _binary(trainer: HAPOTrainer) -> bool:
    rewards = trainer._rewards_per_func
    return rewards is not None and rewards.shape[1] == 1 and bool(((rewards == 0) | (rewards == 1)).all())
