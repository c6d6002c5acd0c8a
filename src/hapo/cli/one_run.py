"""One run of an arm, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import sys
import threading
import traceback
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, get_quantization_config

from ..engines.records import RunRecords, manifest, weights_hash
from ..outputs import write_whole
from ..samplers.transformers import ids_only
from ..tasks import Task
from ..trl import HAPOConfig
from . import UsageError
from .arms import PLAN, TRL, Job, parse_flags, split_task
from .episodes import answering
from .held_out import Course, HeldOut
from .model import AdaptedModelConfig
from .recipe import told
from .run_folder import model_options, model_path, prepare_process
from .train import TrainOptions, build_trainer

TRL_OPTIONS: dict[str, dict[str, Any]] = {"dapo": {"epsilon_high": 0.28}}
"""What an arm of TRL's own sets beside `loss_type`: DAPO's upper bound, which TRL does not take by default."""

ONLY_IN_TRAINING = {"arm", "arm's options", "learning_rate", "beta"}
"""Of a plan and of an arm's options, what changes nothing before the first step."""

GRADIENT_SAMPLE = 2**18
"""Coordinates of the first gradient that a run keeps, evenly spaced over all parameters."""


def run_job(job: Job, device: str | None = None) -> None:
    """Run from the beginning, into an empty folder; the entry of a process.

    Output goes to log.txt in the run's folder; an error leaves its traceback there and exit code 1.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job.folder.mkdir(parents=True, exist_ok=True)
    write_whole(job.folder / PLAN, json.dumps(job.plan, indent=2) + "\n")
    log = os.open(job.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    try:
        _run(job)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # nothing of the libraries' own endings can change what the run left


def _end_with_parent() -> None:
    """No run outlives the comparison that started it: the next one begins it again in the same folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@dataclass(frozen=True)
class Built:
    """A job's trainer, its task without the problems set aside, these, and what the run was told beside."""

    trainer: GRPOTrainer
    task: Task
    tuning: Any
    options: TrainOptions


NEEDED_TO_PARSE = frozenset({"seed", "output_dir", "use_cpu", "bf16"})
"""Flags of TRL that hapo's own parser must see too: it refuses a machine that cannot honour them."""


def build(job: Job) -> Built:
    """The trainer of a job, hapo's or TRL's own, under one recipe."""
    flags = {**job.flags, **job.arm.flags, "seed": job.seed, "output_dir": str(job.folder)}
    if not job.arm.of_trl:
        flags |= {"method": job.arm.name, "method_options": job.arm.options}
    flags = {name: value for name, value in flags.items() if value is not None}
    of_trl = {f.name for f in fields(GRPOConfig)} - NEEDED_TO_PARSE if job.arm.of_trl else set()
    own = {name: value for name, value in flags.items() if name not in of_trl}
    task_config, args, model_config, options = parse_flags(job.recipe, own)
    if task_config.task_seed is None:
        task_config.task_seed = 0
    prepare_process(options.threads)
    task, tuning = split_task(task_config, args.seed, job.tune_size)
    recipe = told(task_config, model_config, options)
    if job.arm.of_trl:
        if task.environment is not None:
            raise UsageError(f"{job.arm.name} plays no environment: compare methods of hapo there")
        trainer = _trl_trainer(task, args, model_config, job.arm.name.removeprefix(TRL), flags, recipe)
    else:
        trainer = build_trainer(task, args, model_config)
        trainer.recipe = recipe
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    return Built(trainer, task, tuning, options)


def _run(job: Job) -> None:
    built = build(job)
    trainer, options = built.trainer, built.options
    problems = built.tuning if job.tuning else built.task.eval
    console = Console(quiet=True)
    course = Course(job.folder, options.token_budget)
    held_out = HeldOut(
        trainer,
        problems,
        built.task.reward_funcs,
        course,
        console,
        every=options.evaluate_every,
        samples=options.evaluate_samples,
        answer=answering(built.task),
    )
    for callback in (course, held_out, FirstGradient(job.folder)):
        trainer.add_callback(callback)
    if job.starts is None:
        held_out.measure(0)
    else:
        held_out.measure_start(job.starts / f"{_start_of(job, trainer, problems)}.jsonl")
    trainer.train()
    held_out.measure(trainer.state.global_step)
    course.finish(trainer.state)


def _start_of(job: Job, trainer: GRPOTrainer, problems: Any) -> str:
    """One hash for all that decides the accuracy before training: the same for the arms of a seed, as a rule."""
    weights = weights_hash(trainer.accelerator.unwrap_model(trainer.model))
    plan = {name: value for name, value in job.plan.items() if name not in ONLY_IN_TRAINING}
    flags = {name: value for name, value in job.arm.flags.items() if name not in ONLY_IN_TRAINING}
    of = [plan, weights, problems._fingerprint, flags, job.arm.of_trl]
    return hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _trl_trainer(
    task: Task,
    args: HAPOConfig,
    model_config: AdaptedModelConfig,
    loss: str,
    flags: dict[str, Any],
    recipe: dict[str, Any],
) -> GRPOTrainer:
    """TRL's own trainer under the same recipe; what hapo alone knows does not act."""
    names = {f.name for f in fields(GRPOConfig) if f.init}
    given = {name: value for name, value in asdict(args.filled_in()).items() if name in names}
    given |= {
        "beta": args.beta or 0.0,
        "generation_batch_size": None,
        "vllm_importance_sampling_mode": _default("vllm_importance_sampling_mode"),
        "use_bias_correction_kl": _default("use_bias_correction_kl"),
    }
    given |= {"loss_type": loss, **TRL_OPTIONS.get(loss, {})}
    given |= {name: value for name, value in flags.items() if name in names}
    config = GRPOConfig(**given)
    config.model_init_kwargs = model_options(model_config, config.model_init_kwargs)
    if task.token_reward is not None:
        raise UsageError(f"{TRL} arms are trained with the reward of whole answers: leave token_reward out")
    trainer = GRPOTrainer(
        model_path(model_config),
        task.reward_funcs,
        config,
        train_dataset=task.train,
        quantization_config=get_quantization_config(model_config),
        peft_config=model_config.adapter(),
    )
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.generation_config = ids_only(model.generation_config)  # as with the other arms
    records = RunRecords.create(
        Path(config.output_dir),
        config={
            **recipe,
            "trl": {k: given[k] for k in ("loss_type", *TRL_OPTIONS.get(loss, {}), "beta", "learning_rate")},
        },
        manifest=manifest(
            seed=config.seed, model=str(model.config._name_or_path), weights_sha256=weights_hash(model)
        ),
    )
    trainer.add_callback(LogLines(records))
    return trainer


class LogLines(TrainerCallback):
    """What a trainer logs, as lines of metrics.jsonl."""

    def __init__(self, records: RunRecords) -> None:
        self.records = records

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append the last line."""
        self.records.add_metrics(state.log_history[-1])


class FirstGradient(TrainerCallback):
    """Keeps evenly spaced coordinates of the first optimiser step's gradient, in first_gradient.safetensors."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "first_gradient.safetensors"

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Write, at the first step."""
        if state.global_step:
            return
        gradients = [p.grad.detach().flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
        stride = max(1, math.ceil(sum(g.numel() for g in gradients) / GRADIENT_SAMPLE))
        sample = torch.cat([g[::stride].float().cpu() for g in gradients])
        save_file({"gradient": sample}, self.file)


def _default(name: str) -> Any:
    return next(f.default for f in fields(GRPOConfig) if f.name == name)
