"""The arms of a comparison, and one run of one of them, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import re
import sys
import threading
import traceback
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, get_quantization_config

import hapo

from ..engines.identity import differences
from ..engines.records import RunRecords, manifest, weights_hash
from ..insight.run import parse_arm
from ..methods import options_of, policy
from ..outputs import file_hash, write_whole
from ..samplers.transformers import ids_only
from ..tasks import Task, TaskConfig, load_task
from ..tasks.answers import normalise
from ..tasks.reward_options import EMBEDDED
from ..trl import HAPOConfig
from . import UsageError, nearest
from .contents import model_identity, reward_identity
from .episodes import answering
from .held_out import Course, HeldOut
from .model import AdaptedModelConfig
from .recipe import RecipeParser, told
from .run_folder import model_options, model_path, named_model, prepare_process
from .train import TrainOptions, build_trainer, config_for

TRL = "trl:"
TRL_OPTIONS: dict[str, dict[str, Any]] = {"dapo": {"epsilon_high": 0.28}}
"""What an arm of TRL's own sets beside `loss_type`: DAPO's upper bound, which TRL does not take by default."""

TRL_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
"""Of TRL 1.16."""

HELD_EQUAL = {
    # what is trained, on which prompts, in which order
    *("seed", "data_seed", "output_dir", "max_steps", "num_train_epochs", "model_init_kwargs"),
    *("shuffle_dataset", "train_sampling_strategy", "length_column_name", "accelerator_config"),
    *(f"dataloader_{name}" for name in ("drop_last", "num_workers", "in_order", "prefetch_factor")),
    *("resume_from_checkpoint", "ignore_data_skip", "run_records", "auto_find_batch_size"),
    # how answers are drawn
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "cache_implementation"),
    *("use_transformers_paged", "use_transformers_continuous_batching", "transformers_continuous_batching_config"),
    *("use_vllm", "vllm_mode", "vllm_model_impl", "vllm_max_model_length", "vllm_structured_outputs_regex"),
    # how they are measured
    *("max_completion_length", "per_device_eval_batch_size", "reward_weights", "chat_template_kwargs"),
}
"""Options of the trainer that no arm may have for itself."""

PLAN = "plan.json"
"""What a run of a comparison is, in its folder; by it the run is known again."""

ASIDE = "aside"
"""Folder of a comparison for runs that gave way."""

NO_CONTENT = {
    *("config", "output_dir", "run_name", "disable_tqdm", "report", "hub_token"),  # names, looks, a secret
    *("seed", "method", "method_options"),  # of the arm and the job
    *("eval_file", "rewards", "model_name_or_path", "curriculum"),  # files, whose content stands for them
}
"""Options that say nothing of what a run of a comparison is."""

ONLY_IN_TRAINING = {"learning_rate", "beta"}
"""Options of an arm that change nothing before the first step."""

GRADIENT_SAMPLE = 2**18
"""Coordinates of the first gradient that a run keeps, evenly spaced over all parameters."""


@dataclass(frozen=True)
class Arm:
    """A method with options, or `trl:LOSS`, TRL's own loss in TRL's own trainer.

    Raises:
        UsageError: unknown method, loss or option, or a value out of range.
    """

    label: str
    name: str = field(init=False)
    options: dict[str, Any] = field(init=False)
    """Of the method."""
    flags: dict[str, Any] = field(init=False)
    """Of the trainer, the task, or the training."""

    def __post_init__(self) -> None:
        try:
            name, given = parse_arm(self.label)
            known = (
                set()
                if name.startswith(TRL)
                else {f.name for f in fields(options_of(name, "policy"))} - {"kl_coef"}
            )
        except ValueError as error:
            raise UsageError(f"arm {self.label!r}: {error}; arms are methods, or {TRL}LOSS_TYPE") from error
        kind = GRPOConfig if name.startswith(TRL) else config_for(name)
        flags = {f.name for f in fields(kind) if f.init} - {"method", "method_options", "loss_type"}
        if name.startswith(TRL) and name.removeprefix(TRL) not in TRL_LOSSES:
            raise UsageError(f"arm {self.label!r}: TRL's losses are {', '.join(TRL_LOSSES)}")
        for key in given:
            held = {f.name for kind in (TaskConfig, TrainOptions) for f in fields(kind)} | HELD_EQUAL
            if key in held - known:
                raise UsageError(
                    f"arm {self.label!r}: {key} decides what is held equal, or how arms are measured; "
                    f"set it for all with --{key}"
                )
            if key not in known | flags:
                raise UsageError(f"arm {self.label!r}: no option {key!r}{nearest(key, known | flags)}")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "options", {k: v for k, v in given.items() if k in known})
        object.__setattr__(self, "flags", {k: v for k, v in given.items() if k not in known})
        try:
            if not self.of_trl:
                policy(name, **self.options)
        except ValueError as error:
            raise UsageError(f"arm {self.label!r}: {error}") from error

    @property
    def of_trl(self) -> bool:
        """Run by TRL's own trainer."""
        return self.name.startswith(TRL)

    @property
    def slug(self) -> str:
        """The label as the name of a folder."""
        return re.sub(r"[^\w.=,+-]+", "_", self.label)


@dataclass(frozen=True)
class Recipe:
    """What a comparison was told of the runs, whatever arm they are of."""

    options: dict[str, Any]
    """What the recipe's file holds."""
    words: list[str]
    """The flags over it."""


@dataclass(frozen=True)
class Job:
    """One run: an arm with a seed, into a folder."""

    arm: Arm
    seed: int
    folder: Path
    recipe: Recipe
    flags: dict[str, Any]
    """What this comparison sets over the recipe; an arm's own flags win."""
    content: dict[str, Any] = field(default_factory=dict)
    """What recipe, data, model and code are, without a name of a file or folder: see `content_of`."""
    tune_size: int = 0
    """Problems set aside from the training data for tuning."""
    tuning: bool = False
    """Measure on those in place of the held-out problems."""
    called: str = ""
    """What messages call it; by default its arm."""
    starts: Path | None = None
    """Folder where runs leave how accurate their model was before training, for those that begin alike."""

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.called or self.arm.label}, seed {self.seed}"

    @property
    def plan(self) -> dict[str, Any]:
        """All that decides the run's result, as JSON, wherever it lies."""
        arm = {"arm": self.arm.name, "arm's options": {**self.arm.options, **self.arm.flags}, "seed": self.seed}
        plan = {**arm, **self.content, **self.flags, "tune_size": self.tune_size, "tuning": self.tuning}
        return json.loads(
            json.dumps({name: value for name, value in plan.items() if value is not None}, default=str)
        )

    @property
    def ours(self) -> bool:
        """What lies in the folder is a run of a comparison, finished or not."""
        return (self.folder / PLAN).is_file()

    @property
    def finished(self) -> bool:
        """A run came to its end here."""
        return self.ours and (self.folder / "finished.json").is_file()

    @property
    def done(self) -> bool:
        """A run of exactly this plan came to its end here."""
        return self.finished and not self.difference()

    def difference(self, ignoring: Collection[str] = ()) -> str:
        """In what the plan of the run that lies here differs, in words; empty where it does not."""
        there, here = json.loads((self.folder / PLAN).read_text()), self.plan
        if "model" not in there:
            return f"a {PLAN} of an earlier hapo, which does not say what its data and model were"
        kept = ({k: v for k, v in plan.items() if k not in ignoring} for plan in (there, here))
        return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1...", differences(*kept))


def content_of(
    recipe: Recipe, task: Task, task_config: TaskConfig, args: HAPOConfig, model: AdaptedModelConfig
) -> dict[str, Any]:
    """What runs are told and read, by its content: the same for a file under another name, or in another place.

    Data, model and the files of rewards are their hashes. A library is its version: an edit of its code is not
    seen, nor one of a module that a reward imports.
    """
    parser = RecipeParser("hapo compare", "", [TaskConfig, type(args), AdaptedModelConfig, TrainOptions])
    options = {k: v for k, v in parser.told(recipe.words, recipe.options).items() if k not in NO_CONTENT}
    for name, value in options.items():
        if isinstance(value, str) and Path(value).suffix and Path(value).expanduser().is_file():
            options[name] = "a file" if name == "dataset" else file_hash(Path(value).expanduser())
    if task.token_reward is not None:
        path = named_model("token_reward.model", task.token_reward.options.path, embedded=(EMBEDDED,))
        options["reward model"] = model_identity(path, None, False)
    return {
        **options,
        "data": task.fingerprint,
        "model": model_identity(model_path(model), model.model_revision, args.trust_remote_code),
        "rewards": reward_identity(task_config.rewards),
        "hapo": hapo.__version__,
        **{name: metadata.version(name) for name in ("torch", "transformers", "trl")},
    }


def set_aside(folder: Path, root: Path) -> Path:
    """Move a folder below `root` into root/aside, under the same path with a number; returns where it went."""
    place = root / ASIDE / folder.relative_to(root)
    to = next(to for n in count(1) if not os.path.lexists(to := place.with_name(f"{place.name}.{n}")))
    to.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(to)
    return to


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


def parse_flags(
    recipe: Recipe, flags: dict[str, Any]
) -> tuple[TaskConfig, HAPOConfig, AdaptedModelConfig, TrainOptions]:
    """The recipe's flags, then these, parsed as `hapo train` does."""
    words = [word for name, value in flags.items() for word in _words(name, value)]
    kind = config_for(flags.get("method", HAPOConfig.method))
    parser = RecipeParser("hapo compare", "", [TaskConfig, kind, AdaptedModelConfig, TrainOptions])
    parser.set_defaults(run_records=True)
    *configs, _ = parser.read([*recipe.words, *words], recipe.options)
    return tuple(configs)


def split_task(config: TaskConfig, seed: int, tune_size: int) -> tuple[Task, Any]:
    """The task without `tune_size` problems of its training data, and those problems.

    Raises:
        UsageError: there are not enough.
    """
    task = load_task(config, seed=seed)
    if not tune_size:
        return task, None
    if tune_size >= len(task.train):
        raise UsageError(f"tune_size {tune_size} leaves none of the {len(task.train)} training problems")
    parts = task.train.train_test_split(test_size=tune_size, seed=0)
    tuning = {normalise(question) for question in parts["test"]["question"]}
    train = parts["train"].filter(lambda row: normalise(row["question"]) not in tuning)
    shown = task.demonstrations
    if shown is not None:
        shown = shown.filter(lambda row: normalise(row["question"]) not in tuning)
    return replace(task, train=train, demonstrations=shown), parts["test"]


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
    flags = {name: value for name, value in job.arm.flags.items() if name not in ONLY_IN_TRAINING}
    of = [job.content, weights, problems._fingerprint, job.seed, flags, job.arm.of_trl]
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


def _words(name: str, value: Any) -> list[str]:
    """A flag and its value, in one word where it is one, which may then begin with a minus."""
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict | bool) else value}"]
