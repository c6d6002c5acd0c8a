"""`hapo train`: a recipe and flags in, a run folder with records, checkpoints, accuracy and model out."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate.utils import gather_object
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, ProgressCallback
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..assets import tiny_model_path
from ..engines.records import check_writable
from ..engines.trl.checkpoint import complete_checkpoints
from ..tasks import Task, TaskConfig, load_task
from ..trl import HAPOConfig, HAPOTrainer
from . import INTERRUPTED, UsageError
from .measure import Decoding, Estimate, draw_answers, estimate
from .progress import Interrupt, TrainingProgress, counting
from .recipe import RecipeParser, told

DESCRIPTION = """Train a model with verifiable rewards. Flags: those of the task, of TRL's GRPOConfig with a
method, and of TRL's ModelConfig. Without --config or --model: the embedded demo."""


@dataclass
class TrainOptions:
    """What `hapo train` takes beside task, trainer and model."""

    evaluate: bool = field(
        default=True, metadata={"help": "measure accuracy on the held-out problems before and after training"}
    )
    threads: int | None = field(
        default=None,
        metadata={"help": "CPU threads of torch (default: torch's); the last bits of results depend on it"},
    )

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")


def main(argv: list[str]) -> int:
    """Train, and return the exit code."""
    argv, checkpoint = _resume(argv)
    parser = RecipeParser("hapo train", DESCRIPTION, [TaskConfig, HAPOConfig, ModelConfig, TrainOptions])
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with the run in this folder, or from this checkpoint of it; goes alone",
    )
    parser.set_defaults(run_records=True)
    task_config, args, model_config, options, _ = parser.read(argv)
    _check(args, model_config, resuming=checkpoint is not None)
    console = Console(quiet=args.process_index != 0, highlight=False, markup=False)
    prepare_process(options)
    task = load_task(task_config, seed=args.seed)
    trainer = build_trainer(task, args, model_config)
    trainer.recipe = told(task_config, model_config, options)
    console.print(
        f"{trainer.method.name} on {task.name}: {len(task.train)} problems to train on, "
        f"{len(task.eval)} held out; run folder {args.output_dir}",
        soft_wrap=True,
    )
    evaluation = Evaluation(trainer, task, console) if options.evaluate else None
    if evaluation:
        evaluation.measure("before", again=checkpoint is None)
    finished = _train(trainer, checkpoint, console)
    if finished:
        trainer.save_model(str(Path(args.output_dir) / "model"))
        if evaluation:
            evaluation.measure("after")
            evaluation.print()
        console.print(f"model: {Path(args.output_dir) / 'model'}", soft_wrap=True)
    trainer.accelerator.wait_for_everyone()  # gloo aborts a rank whose peer has gone
    trainer.end()
    return 0 if finished else INTERRUPTED


def build_trainer(task: Task, args: HAPOConfig, model_config: ModelConfig) -> HAPOTrainer:
    """The trainer of a task, its model loaded as the options say."""
    given = args.model_init_kwargs
    args.model_init_kwargs = {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
        **(given or {}),
    }
    trainer = HAPOTrainer(
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


def model_path(model_config: ModelConfig) -> str:
    """Path or Hub id of the model; "tiny" is the embedded one."""
    name = model_config.model_name_or_path
    if name is None:
        raise UsageError("no model is named: set model_name_or_path to a folder, a Hub id, or tiny")
    return str(tiny_model_path()) if name == "tiny" else name


def prepare_process(options: TrainOptions) -> None:
    """Threads; bars of the libraries off, and the warnings that they raise about their own code."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    own = "`(is_gradient_checkpointing|gradient_checkpointing_(en|dis)able)` is deprecated"
    warnings.filterwarnings("ignore", own, FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


class Evaluation:
    """Greedy and sampled accuracy on the held-out problems, kept in the run's evaluation.json."""

    def __init__(self, trainer: HAPOTrainer, task: Task, console: Console) -> None:
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ValueError(
                "held-out accuracy is measured with a whole model on each device, which DeepSpeed and FSDP split: "
                "set evaluate to false, and measure with `hapo eval` afterwards"
            )
        self.trainer, self.task, self.console = trainer, task, console
        self.file = Path(trainer.args.output_dir) / "evaluation.json"
        self.results: dict[str, Any] = {}

    def measure(self, when: str, again: bool = True) -> None:
        """Measure and write, on all processes; without `again` read what was measured."""
        if not again:
            self.results = json.loads(self.file.read_text())
            return
        started, args = time.monotonic(), self.trainer.args
        law = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
        found: dict[str, Any] = {
            "greedy": self._estimate(f"held out, {when}: greedy").to_dict(),
            "sampled": self._estimate(f"held out, {when}: sampled", **law).to_dict(),
        }
        self.results[when] = {**found, "seconds": round(time.monotonic() - started, 1)}
        if args.process_index == 0:
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps(self.results, indent=2) + "\n")
            os.replace(partial, self.file)

    def _estimate(self, what: str, **law: Any) -> Estimate:
        trainer, args = self.trainer, self.trainer.args
        first, every = args.process_index, args.world_size
        mine = self.task.eval.select(range(first, len(self.task.eval), every))
        decoding = Decoding(
            max_new_tokens=args.max_completion_length,
            batch_size=args.per_device_eval_batch_size,
            seed=args.seed + args.process_index,
            **law,
        )
        with counting(self.console, what, len(mine)) as advance:
            answers = draw_answers(
                trainer.accelerator.unwrap_model(trainer.model),
                trainer.processing_class,
                mine,
                self.task.reward_funcs,
                decoding,
                weights=args.reward_weights,
                chat_template_kwargs=args.chat_template_kwargs,
                advance=advance,
            )
        return estimate(gather_object([replace(a, problem=first + every * a.problem) for a in answers]))

    def print(self) -> None:
        """The table: before, after, and the change."""
        before, after = self.results["before"], self.results["after"]
        table = Table(box=box.SIMPLE)
        for column in ("held out", "before", "after", "change"):
            table.add_column(column, no_wrap=True)
        for how in ("greedy", "sampled"):
            first, last = Estimate(**before[how]), Estimate(**after[how])
            change = last.mean - first.mean
            shown = f"{100 * change:+.1f} points" if first.binary and last.binary else f"{change:+.3f}"
            table.add_row(how, str(first), str(last), shown)
        self.console.print(table)
        self.console.print(
            f"{last.problems} problems, 95 % intervals; sampled at temperature {self.trainer.args.temperature:g}"
        )


def _train(trainer: HAPOTrainer, checkpoint: bool | str | None, console: Console) -> bool:
    """Train; False if it was interrupted. However it ends early, say how to go on."""
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
    if len(words) != 2 or words[0] != "--resume":
        raise UsageError("--resume RUN goes alone: a resumed run keeps its own options")
    run = Path(words[1])
    named = run.name.startswith("checkpoint-")
    folder = run.parent.parent if named else run
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"{run} is no run to resume: {folder / 'config.yaml'} does not exist")
    checkpoint = str(run) if named else True
    return ["--config", str(folder / "config.yaml"), "--output_dir", str(folder)], checkpoint


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
    check_writable(folder)
