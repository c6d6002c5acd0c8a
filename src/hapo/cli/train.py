"""`hapo train`: a recipe and flags in, a run folder with records, checkpoints, accuracy and model out."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from accelerate.utils import gather_object
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import ModelConfig, get_peft_config, get_quantization_config

import hapo

from ..assets import tiny_model_path
from ..engines.records import check_writable, files_of_run
from ..engines.trl.checkpoint import complete_checkpoints, state_of
from ..insight.run import Run
from ..outputs import write_whole
from ..tasks import Task, TaskConfig, load_task
from ..trl import DiffusionConfig, DiffusionTrainer, HAPOConfig, HAPOTrainer
from . import INTERRUPTED, UsageError
from .held_out import Course, HeldOut
from .progress import Interrupt, TrainingProgress
from .recipe import RecipeParser, recipe_of, told

DESCRIPTION = """Train a model with verifiable rewards. Flags: those of the task, of TRL's GRPOConfig with a
method, and of TRL's ModelConfig. Without --config or --model: the embedded demo."""


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
    argv, checkpoint = _resume(argv)
    if checkpoint is True and _is_finished(argv):
        return 0
    parser = RecipeParser("hapo train", DESCRIPTION, [TaskConfig, config_of(argv), ModelConfig, TrainOptions])
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with the run in this folder, or from this checkpoint of it; goes alone, or with --max_steps, "
        "which prolongs a run",
    )
    parser.set_defaults(run_records=True)
    task_config, args, model_config, options, _ = parser.read(argv)
    _check(args, model_config, resuming=checkpoint is not None)
    console = Console(quiet=args.process_index != 0, highlight=False, markup=False)
    prepare_process(options)
    task = load_task(task_config, seed=args.seed)
    folder = Path(args.output_dir)
    _check_same_data(task, gather_object([task.fingerprint]), Run(folder).manifest if checkpoint else {})
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
        )
        if checkpoint is None:
            held_out.measure(0)
    if checkpoint is not None and args.process_index == 0:
        _prolong(folder / "config.yaml", args.max_steps)
    finished = checkpoint is not None and _take_up_last(trainer, course, checkpoint)
    if not finished:
        finished = _train(trainer, checkpoint, console, [course] if held_out is None else [course, held_out])
    if finished:
        _save_model(trainer, folder / "model")
        if held_out is not None:
            held_out.measure(trainer.state.global_step)
            held_out.print()
        trainer.create_model_card(weights="model")
        if args.process_index == 0:
            course.finish(trainer.state)
        console.print(f"model: {folder / 'model'}", soft_wrap=True)
    if options.report and args.process_index == 0:
        _report(folder, console)
    trainer.accelerator.wait_for_everyone()  # gloo aborts a rank whose peer has gone
    trainer.end()
    return 0 if finished else INTERRUPTED


def _save_model(trainer: HAPOTrainer, folder: Path) -> None:
    """The model as a whole folder: a kill leaves the one of before, if there is one, or none."""
    partial, old = folder.with_name("model.partial"), folder.with_name("model.old")
    first = trainer.args.process_index == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)  # of a try of this run that was killed here
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if first:
        if folder.exists():  # of the run before it was prolonged, or taken back to a checkpoint
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def _report(folder: Path, console: Console) -> None:
    """The page of the run; whatever it trips over, the run is complete without it."""
    try:
        from ..insight.report import write_report

        console.print(f"report: {write_report([folder], folder / 'report.html')}", soft_wrap=True)
    except Exception as error:
        console.print(f"no report ({type(error).__name__}: {error}); try: hapo report {folder}", soft_wrap=True)


def build_trainer(task: Task, args: HAPOConfig, model_config: ModelConfig) -> HAPOTrainer:
    """The trainer of a task, its model loaded as the options say."""
    given = args.model_init_kwargs
    args.model_init_kwargs = model_options(model_config, given)
    kind = DiffusionTrainer if isinstance(args, DiffusionConfig) else HAPOTrainer
    trainer: HAPOTrainer = kind(
        model_path(model_config),
        task.reward_funcs,
        args,
        train_dataset=task.train,
        eval_dataset=task.eval if args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_config),
        peft_config=get_peft_config(model_config),
    )
    trainer.args.model_init_kwargs = given  # the run's config.yaml has them under the names that the user gave
    return trainer


def model_options(model_config: ModelConfig, given: dict[str, Any] | None) -> dict[str, Any]:
    """How the model is loaded: the options of the model, and over them `model_init_kwargs` as given."""
    return {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
        **(given or {}),
    }


def model_path(model_config: ModelConfig) -> str:
    """Path or Hub id of the model; "tiny" is the embedded one."""
    name = model_config.model_name_or_path
    if name is None:
        raise UsageError("no model is named: set model_name_or_path to a folder, a Hub id, or tiny")
    return str(tiny_model_path()) if name == "tiny" else name


def config_of(argv: list[str]) -> type[HAPOConfig]:
    """The class of the trainer's options: that of the method which flags or recipe name.

    Raises:
        UsageError: there is no such recipe, or it is malformed.
    """

    def flag(name: str) -> str | None:
        words = [part for word in argv for part in (word.split("=", 1) if word.startswith(name) else [word])]
        found = [i for i, word in enumerate(words[:-1]) if word == name]
        return words[found[-1] + 1] if found else None

    named = flag("--method") or recipe_of(flag("--config"), flag("--model")).get("method", HAPOConfig.method)
    known = str(named) in hapo.methods("policy") and hapo.method(str(named)).likelihood is not None
    return DiffusionConfig if known else HAPOConfig


def prepare_process(options: TrainOptions) -> None:
    """Threads; bars of the libraries off, and the warnings that they raise about their own code."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    own = "`(is_gradient_checkpointing|gradient_checkpointing_(en|dis)able)` is deprecated"
    warnings.filterwarnings("ignore", own, FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _train(
    trainer: HAPOTrainer, checkpoint: bool | str | None, console: Console, callbacks: list[TrainerCallback]
) -> bool:
    """Train; False if it was interrupted. However it ends early, say how to go on."""
    for callback in callbacks:
        trainer.add_callback(callback)
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    progress = TrainingProgress(console, lambda: _binary(trainer))
    trainer.add_callback(progress)
    try:
        with closing(progress), Interrupt(console) as interrupt:
            trainer.add_callback(interrupt)
            trainer.train(resume_from_checkpoint=checkpoint)
    except BaseException:
        _say_how_to_resume(trainer)
        raise
    if interrupt.caught:
        _say_how_to_resume(trainer)
    return not interrupt.caught


def _take_up_last(trainer: HAPOTrainer, course: Course, checkpoint: bool | str) -> bool:
    """Take up a run that was killed between its last optimiser step and its end; False for any other."""
    saved = complete_checkpoints(Path(trainer.args.output_dir) / "checkpoints")
    named = [path for path in saved if checkpoint is True or path.samefile(str(checkpoint))]
    if not named:
        return False
    last = named[-1]
    state = state_of(last)
    spent = course.is_spent(state) and state.global_step % trainer.args.updates_per_rollout == 0
    if not (spent or trainer.is_last(last)):
        return False
    trainer.take_up_last(last)
    course.take_up(state)
    return True


def _binary(trainer: HAPOTrainer) -> bool:
    rewards = trainer._rewards_per_func
    return rewards is not None and rewards.shape[1] == 1 and bool(((rewards == 0) | (rewards == 1)).all())


def _say_how_to_resume(trainer: HAPOTrainer) -> None:
    folder = trainer.args.output_dir
    if trainer.args.process_index or not (Path(folder) / "manifest.json").exists():
        return
    saved = complete_checkpoints(Path(folder) / "checkpoints")
    if saved:
        print(f"{saved[-1].name} is saved; resume with: hapo train --resume {folder}", file=sys.stderr)
    else:
        print(f"no checkpoint was written yet; remove {folder} to start again", file=sys.stderr)


def _resume(argv: list[str]) -> tuple[list[str], bool | str | None]:
    """Arguments and checkpoint of `--resume RUN`; the arguments as they are without it."""
    if not any(word.partition("=")[0] == "--resume" for word in argv):
        return argv, None
    words = [part for word in argv for part in word.split("=", 1)]
    told = dict(zip(words[::2], words[1::2], strict=False))
    known = {"--resume"} <= told.keys() <= {"--resume", "--max_steps"}
    if not known or len(words) != 2 * len(told):
        raise UsageError(
            "--resume RUN goes alone, or with --max_steps N to prolong it: a resumed run keeps its own options"
        )
    run = Path(told["--resume"])
    named = run.name.startswith("checkpoint-")
    folder = run.parent.parent if named else run
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"{run} is no run to resume: {folder / 'config.yaml'} does not exist")
    checkpoint = str(run) if named else True
    longer = ["--max_steps", told["--max_steps"]] if "--max_steps" in told else []
    return ["--config", str(folder / "config.yaml"), "--output_dir", str(folder), *longer], checkpoint


def _is_finished(argv: list[str]) -> bool:
    """Whether the run of `_resume` had come to its end; then it says so, and writes the report if there is none.

    Raises:
        UsageError: `--max_steps` is to prolong a finished run by no step.
    """
    folder, longer = Path(argv[3]), argv[5:]
    done = Run(folder).finished
    if done is None:
        return False
    steps = done["steps"]
    if longer and not longer[0].isdecimal():
        raise UsageError(f"--max_steps must be a whole number, got {longer[0]!r}")
    if longer and int(longer[0]) > steps:
        return False
    if longer:
        raise UsageError(f"the run has {steps} optimiser steps: --max_steps must be above that, got {longer[0]}")
    console = Console(quiet=os.environ.get("RANK", "0") != "0", highlight=False, markup=False)
    console.print(
        f"{folder} is finished: {steps} optimiser steps ({done['why']}). Nothing to do; to prolong it: hapo train "
        f"--resume {folder} --max_steps {2 * steps}",
        soft_wrap=True,
    )
    if not (folder / "report.html").exists() and os.environ.get("RANK", "0") == "0":
        _report(folder, console)
    return True


def _check_same_data(task: Task, everywhere: list[str], manifest: dict[str, Any]) -> None:
    """Raise a ValueError unless all processes, and the run that goes on, have the same data.

    `everywhere` are the fingerprints of the task in all processes. Another version of `datasets` may take
    another fingerprint of the same rows, so nothing is said where that has changed since the run began.
    """
    if len(set(everywhere)) > 1:
        raise ValueError(
            "the processes of this run have different data, so that their problems would be mixed up: let all of "
            "them read the same files"
        )
    began, same = manifest.get("data_fingerprint"), manifest.get("versions", {}).get("datasets")
    if began and same == datasets.__version__ and began != task.train._fingerprint:
        raise ValueError(
            f"the training data of {task.name} are no longer those that this run began with, and its steps would "
            "be taken on other problems: put the data back, or start a new run"
        )


def _prolong(config: Path, max_steps: int) -> None:
    """Write the length of the run into its config.yaml, where it has changed."""
    told = yaml.safe_load(config.read_text())
    if told.get("max_steps", -1) != max_steps:
        write_whole(config, yaml.safe_dump({**told, "max_steps": max_steps}, sort_keys=False, allow_unicode=True))


def _check(args: HAPOConfig, model_config: ModelConfig, *, resuming: bool) -> None:
    """What can be known before anything is loaded; the run folder is the first process's business."""
    if args.resume_from_checkpoint:
        raise UsageError("resume with `hapo train --resume RUN` in place of resume_from_checkpoint")
    if not args.run_records:
        raise UsageError("run_records cannot be off: `hapo train` resumes and reports from the records")
    model_path(model_config)
    if args.process_index:
        return
    folder = Path(args.output_dir)
    if not resuming and (folder / "manifest.json").exists():
        raise UsageError(
            f"the run folder {folder} exists: choose another --output_dir, remove it, or go on with "
            f"`hapo train --resume {folder}`"
        )
    if not resuming and (there := files_of_run(folder)):
        raise UsageError(
            f"a run in {folder} would write over {', '.join(there)}: choose another --output_dir, or move what is "
            "there"
        )
    check_writable(folder)
