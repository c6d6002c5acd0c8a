"""What `hapo train` and `hapo sft` have in common: the run folder, from its first check to the saved model."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from huggingface_hub.errors import HFValidationError
from rich.console import Console
from transformers import PreTrainedConfig, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils.peft_utils import find_adapter_config_file
from trl import ModelConfig

from ..assets import MODELS
from ..engines.records import check_writable, files_of_run
from ..engines.trl.checkpoint import complete_checkpoints, state_of
from ..engines.trl.recorded import Recorded
from ..insight.run import Run
from ..outputs import write_whole
from ..tasks.reward_options import unread
from . import UsageError
from .held_out import Course
from .progress import Interrupt, TrainingProgress
from .recipe import RecipeParser


def check_folder(command: str, args: Any, model_config: ModelConfig, *, resuming: bool) -> None:
    """What can be known before anything is loaded; the run folder is the first process's business."""
    if args.resume_from_checkpoint:
        raise UsageError(f"resume with `hapo {command} --resume RUN` in place of resume_from_checkpoint")
    if not args.run_records:
        raise UsageError(f"run_records cannot be off: `hapo {command}` resumes and reports from the records")
    path = Path(model_path(model_config))
    if (path / "adapter_config.json").is_file() and not (path / "config.json").exists():
        raise UsageError(
            f"{path} is an adapter, and training begins with a whole model: name its base model; to train the "
            f"adapter further, prolong its run with `hapo {command} --resume RUN --max_steps N`"
        )
    if args.process_index:
        return
    folder = Path(args.output_dir)
    if not resuming and (folder / "manifest.json").exists():
        raise UsageError(
            f"the run folder {folder} exists: choose another --output_dir, remove it, or go on with "
            f"`hapo {command} --resume {folder}`"
        )
    if not resuming and (there := files_of_run(folder)):
        raise UsageError(
            f"a run in {folder} would write over {', '.join(there)}: choose another --output_dir, or move what is "
            "there"
        )
    check_writable(folder)


def prepare_process(threads: int | None) -> None:
    """Threads; bars of the libraries off, and the warnings that they raise about their own code."""
    if threads is not None:
        torch.set_num_threads(threads)
    own = "`(is_gradient_checkpointing|gradient_checkpointing_(en|dis)able)` is deprecated"
    warnings.filterwarnings("ignore", own, FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def model_path(model_config: ModelConfig) -> str:
    """Path or Hub id of the model; "tiny" and "diffusion_tiny" are embedded.

    Raises:
        UsageError: none is named, or there is no such model.
    """
    name = model_config.model_name_or_path
    if name is None:
        raise UsageError("no model is named: set model_name_or_path to a folder, a Hub id, or tiny")
    return named_model("model_name_or_path", name, model_config.model_revision)


def named_model(option: str, name: str, revision: str | None = None, embedded: Iterable[str] = MODELS) -> str:
    """Path or Hub id of the model, or adapter, that an option names; its config is looked for.

    Raises:
        UsageError: there is none.
    """
    path = str(MODELS.get(name, name))
    try:
        if find_adapter_config_file(path, revision=revision) is None:
            PreTrainedConfig.get_config_dict(path, revision=revision)
    except (OSError, HFValidationError) as error:
        raise UsageError(
            f"{option} {name!r} {unread(name, error)}: name a folder with a model, one on the Hub that this "
            f"machine can reach, or an embedded one ({', '.join(embedded)})"
        ) from error
    return path


def model_options(model_config: ModelConfig, given: dict[str, Any] | None) -> dict[str, Any]:
    """How the model is loaded: the options of the model, and over them `model_init_kwargs` as given."""
    return {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
        **(given or {}),
    }


def run_training(
    command: str,
    trainer: Recorded,
    checkpoint: bool | str | None,
    console: Console,
    callbacks: list[TrainerCallback],
    binary: Callable[[], bool] = lambda: False,
) -> bool:
    """Train; False if it was interrupted. However it ends early, say how to go on.

    `binary` says whether the rewards of the last rollout are all 0 or 1.
    """
    for callback in callbacks:
        trainer.add_callback(callback)
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    progress = TrainingProgress(console, binary)
    trainer.add_callback(progress)
    try:
        with closing(progress), Interrupt(console) as interrupt:
            trainer.add_callback(interrupt)
            trainer.train(resume_from_checkpoint=checkpoint)
    except BaseException:
        _say_how_to_resume(command, trainer)
        raise
    if interrupt.caught:
        _say_how_to_resume(command, trainer)
    return not interrupt.caught


def _say_how_to_resume(command: str, trainer: Recorded) -> None:
    folder = trainer.args.output_dir
    if trainer.args.process_index or not (Path(folder) / "manifest.json").exists():
        return
    saved = complete_checkpoints(Path(folder) / "checkpoints")
    if saved:
        print(f"{saved[-1].name} is saved; resume with: hapo {command} --resume {folder}", file=sys.stderr)
    else:
        print(f"no checkpoint was written yet; remove {folder} to start again", file=sys.stderr)


def add_resume(parser: RecipeParser) -> None:
    """The flag --resume, which `resumed` reads before the others: there for the help."""
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with the run in this folder, or from this checkpoint of it; goes alone, or with --max_steps, "
        "which prolongs a run",
    )


def resumed(argv: list[str]) -> tuple[list[str], bool | str | None]:
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


def is_finished(command: str, argv: list[str]) -> bool:
    """Whether the run of `resumed` had come to its end; then it says so, and writes the report if there is none.

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
        f"{folder} is finished: {steps} optimiser steps ({done['why']}). Nothing to do; to prolong it: "
        f"hapo {command} --resume {folder} --max_steps {2 * steps}",
        soft_wrap=True,
    )
    if not (folder / "report.html").exists() and os.environ.get("RANK", "0") == "0":
        write_page(folder, console)
    return True


def check_same_data(name: str, fingerprint: str, everywhere: list[str], manifest: dict[str, Any]) -> None:
    """Raise a ValueError unless all processes, and the run that goes on, have the same data.

    `everywhere` are the fingerprints of all data in all processes, `fingerprint` is that of the training data.
    Another version of `datasets` may take another fingerprint of the same rows, so nothing is said where that has
    changed since the run began.
    """
    if len(set(everywhere)) > 1:
        raise ValueError(
            "the processes of this run have different data, so that their problems would be mixed up: let all of "
            "them read the same files"
        )
    began, same = manifest.get("data_fingerprint"), manifest.get("versions", {}).get("datasets")
    if began and same == datasets.__version__ and began != fingerprint:
        raise ValueError(
            f"the training data of {name} are no longer those that this run began with, and its steps would "
            "be taken on other problems: put the data back, or start a new run"
        )


def prolong(config: Path, max_steps: int) -> None:
    """Write the length of the run into its config.yaml, where it has changed.

    Raises:
        UsageError: the run has a curriculum, whose stages are shares of its length.
    """
    told = yaml.safe_load(config.read_text())
    if told.get("max_steps", -1) != max_steps:
        if told.get("stage_column") not in (None, "none"):
            raise UsageError(
                "--max_steps cannot prolong a run with a curriculum, for its stages are shares of its length: "
                f"resume it as it is, or start a new run with --model {config.parent / 'model'}"
            )
        write_whole(config, yaml.safe_dump({**told, "max_steps": max_steps}, sort_keys=False, allow_unicode=True))


def take_up_last(trainer: Recorded, course: Course, checkpoint: bool | str) -> bool:
    """Take up a run that was killed between its last optimiser step and its end; False for any other."""
    saved = complete_checkpoints(Path(trainer.args.output_dir) / "checkpoints")
    named = [path for path in saved if checkpoint is True or path.samefile(str(checkpoint))]
    if not named:
        return False
    last = named[-1]
    state = state_of(last)
    # Only a policy run has a token budget, which ends it where a rollout batch is used up.
    spent = course.is_spent(state) and state.global_step % trainer.args.updates_per_rollout == 0
    if not (spent or trainer.is_last(last)):
        return False
    trainer.take_up_last(last)
    course.take_up(state)
    return True


def save_model(trainer: Any, folder: Path) -> None:
    """The model as a whole folder: a kill leaves the one of before, if there is one, or none.

    Of the trainer `args.process_index`, `accelerator` and `save_model(folder)` are used.
    """
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


def write_page(folder: Path, console: Console) -> None:
    """The page of the run; whatever it trips over, the run is complete without it."""
    try:
        from ..insight.report import write_report

        console.print(f"report: {write_report([folder], folder / 'report.html')}", soft_wrap=True)
    except Exception as error:
        console.print(f"no report ({type(error).__name__}: {error}); try: hapo report {folder}", soft_wrap=True)
