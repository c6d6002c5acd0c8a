"""`hapo compare`: arms x seeds on one recipe, as paired runs, with intervals and a verdict in words."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout
from rich import box
from rich.console import Console
from rich.table import Table
from trl import ModelConfig

from ..engines.records import check_writable, write_whole
from ..insight.run import Run
from ..tasks import TaskConfig
from ..trl import HAPOConfig
from . import UsageError
from .arms import TRL, Arm, Job, parse_flags, split_task
from .finished import finished_runs, split_named
from .jobs import find_gpus, run_all
from .recipe import DEFAULT, RecipeParser, read_recipe
from .train import TrainOptions

if TYPE_CHECKING:
    import pandas as pd

DESCRIPTION = """Compare methods on one recipe: same problems, initial weights and sampling seeds, paired by seed.
Takes the flags of `hapo train`, which hold for every arm. An arm is a method with options, hapo:components=BCD, or
trl:LOSS_TYPE, TRL's own loss in TRL's own trainer. Run again with the same output_dir it goes on where it was
stopped; with more arms or seeds it adds them. With --runs it trains nothing, and compares runs that are there."""

OUTPUT = "runs/compare"
"""Folder of a comparison that names none; a recipe's own is that of its run."""

ABLATION = (*(f"hapo:components={parts}" for parts in ("A", "B", "C", "D", "AB", "ABC")), "hapo")

EVERY = 10
"""Measurements along a run where evaluate_every is not set."""


@dataclass
class CompareOptions:
    """What `hapo compare` takes beside a recipe."""

    runs: list[str] = field(
        default_factory=list,
        metadata={"help": "ARM=FOLDER, each: compare these finished runs, from any engine, and train nothing"},
    )
    arms: list[str] = field(
        default_factory=list, metadata={"help": "NAME[:option=value,...] or trl:LOSS_TYPE[:flag=value,...], each"}
    )
    ablation: bool = field(
        default=False,
        metadata={"help": f"the components of HAPO as arms ({', '.join(ABLATION)}), against dapo, which has none"},
    )
    seeds: int = field(
        default=8, metadata={"help": "runs of each arm, paired over arms; at least 5 for intervals"}
    )
    first_seed: int = field(default=1, metadata={"help": "the seeds count up from here"})
    reference: str | None = field(
        default=None, metadata={"help": "the arm that the others are compared with (default: dapo, or the first)"}
    )
    target: float | None = field(
        default=None,
        metadata={
            "help": "held-out accuracy for tokens and seconds to a target (default: half the reference's gain)"
        },
    )
    tune: list[float] = field(
        default_factory=list,
        metadata={"help": "learning rates to choose from for each arm, on problems and seeds of their own"},
    )
    tune_seeds: int = field(default=2, metadata={"help": "runs of each arm and learning rate in tuning"})
    tune_size: int = field(default=200, metadata={"help": "problems set aside from the training data for tuning"})
    jobs: int | None = field(
        default=None, metadata={"help": "runs at once (default: one a GPU; else cores / threads of a run)"}
    )

    def __post_init__(self) -> None:
        for name in ("seeds", "tune_seeds", "tune_size", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if any(rate <= 0 for rate in self.tune):
            raise ValueError(f"tune must be learning rates above 0, got {self.tune}")
        if self.ablation:
            self.arms = [*(["dapo"] if "dapo" not in self.arms else []), *self.arms]
            self.arms += [arm for arm in ABLATION if arm not in self.arms]
        if self.runs:
            self.arms = list(dict.fromkeys(split_named(word)[0] for word in self.runs))
        if not self.arms:
            self.arms = ["hapo", "dapo", "grpo", "trl:dapo"]
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"an arm is named twice: {', '.join(self.arms)}")
        if self.reference is None:
            self.reference = "dapo" if "dapo" in self.arms else self.arms[0]
        if self.reference not in self.arms:
            raise ValueError(f"the reference {self.reference!r} is none of the arms ({', '.join(self.arms)})")


def main(argv: list[str]) -> int:
    """Compare, and return the exit code: 1 where a run failed."""
    kinds = [TaskConfig, HAPOConfig, ModelConfig, TrainOptions, CompareOptions]
    parser = RecipeParser("hapo compare", DESCRIPTION, kinds)
    parser.set_defaults(run_records=True)
    task_config, args, _, training, options, _ = parser.read(argv)
    given = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    folder = Path(args.output_dir) if "output_dir" in given else Path(OUTPUT)
    console = Console(highlight=False, markup=False)
    if options.runs:
        return _compare_finished(folder, options, given, console)
    if "seed" in given:
        raise UsageError("the seeds of a comparison count up from --first_seed; drop --seed")
    arms = [Arm(label) for label in options.arms]
    tune_size = options.tune_size if options.tune else 0
    _check(folder, args, training, arms)
    with _alone(folder):
        return _compare(argv, folder, task_config, args, training, options, arms, tune_size, console)


def _compare_finished(folder: Path, options: CompareOptions, given: set[str], console: Console) -> int:
    """Compare runs that exist already."""
    if trained := sorted(given - {"runs", "reference", "target", "output_dir"}):
        raise UsageError(f"--runs trains nothing: drop {', '.join(f'--{name}' for name in trained)}")
    runs = finished_runs(options.runs)
    _check_folder(folder)
    if (folder / "compare.json").exists():
        raise UsageError(f"{folder} holds a comparison that trains its runs: choose another --output_dir")
    with _alone(folder):
        _conclude(runs, folder, options, None, console)
    return 0


def _compare(
    argv: list[str],
    folder: Path,
    task_config: TaskConfig,
    args: HAPOConfig,
    training: TrainOptions,
    options: CompareOptions,
    arms: list[Arm],
    tune_size: int,
    console: Console,
) -> int:
    recipe = _settle(argv, folder, options, task_config, args, tune_size, arms)
    threads = training.threads or 1
    flags: dict[str, Any] = {
        "evaluate": True,
        "report": False,
        "save_strategy": "no",
        "save_steps": 500,
        "threads": threads,
    }
    if any(arm.of_trl for arm in arms) and args.max_num_gen_batches > 1:
        console.print("TRL's trainer has no dynamic sampling: max_num_gen_batches is 1 in every arm")
        flags["max_num_gen_batches"] = 1
    if training.evaluate_every is None:
        flags["evaluate_every"] = max(1, args.max_steps // EVERY)
    jobs = options.jobs or len(find_gpus()) or max(1, (os.cpu_count() or 1) // threads)

    def job(arm: Arm, seed: int, where: Path, **changes: Any) -> Job:
        return Job(arm, seed, where / f"seed-{seed}", recipe, {**flags, **changes}, tune_size)

    rates: dict[str, float] = {}
    tuned = None
    if options.tune:
        seeds = range(options.first_seed + 1000, options.first_seed + 1000 + options.tune_seeds)
        once = {"evaluate_every": args.max_steps}
        tuning = {
            (arm.label, rate, seed): Job(
                **{
                    **vars(job(arm, seed, folder / "tuning" / arm.slug / f"{rate:g}", **once, learning_rate=rate)),
                    "tuning": True,
                }
            )
            for rate in options.tune
            for seed in seeds
            for arm in arms
            if "learning_rate" not in arm.flags
        }
        if not run_all(list(tuning.values()), jobs, "tuning", console):
            return 1
        tuned = _tuning_table(tuning)
        tuned.to_csv(folder / "tuning.csv", index=False)
        rates = _choose(tuned, console)
    runs = {
        (arm.label, seed): job(
            arm,
            seed,
            folder / "runs" / arm.slug,
            **({"learning_rate": rates[arm.label]} if arm.label in rates else {}),
        )
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        for arm in arms
    }
    complete = run_all(list(runs.values()), jobs, "runs", console)
    finished = {key: one.folder for key, one in runs.items() if one.done}
    _conclude(finished, folder, options, tuned, console)
    return 0 if complete else 1


def _conclude(
    runs: dict[tuple[str, int], Path],
    folder: Path,
    options: CompareOptions,
    tuned: pd.DataFrame | None,
    console: Console,
) -> None:
    """Write the page and the tables; print the table of arms, the verdicts, and what cannot be shown."""
    from ..insight.compare import MEASURES, read_comparison
    from ..insight.compare_page import summary, write_comparison

    comparison = read_comparison(runs, str(options.reference), options.target)
    page = write_comparison(comparison, folder, tuned)
    found = summary(comparison)
    shown = [*(measure.title for measure in comparison.accuracies), "reached the target", "collapsed"]
    table = Table("arm", *shown, box=box.SIMPLE)
    for arm in found.index:
        table.add_row(arm, *found.loc[arm, shown])
    console.print(table)
    for measure in MEASURES[:4]:
        verdicts = comparison.table(measure)
        if verdicts is not None:
            console.print(measure.title)
            for arm, words in verdicts["verdict"].items():
                console.print(f"  {arm}: {words}", soft_wrap=True)
    for warning in comparison.warnings:
        console.print(f"warning: {warning}", soft_wrap=True)
    console.print(f"page: {page}; raw numbers: results.csv, curves.csv beside it", soft_wrap=True)


def _tuning_table(tuning: dict[tuple[str, float, int], Job]) -> pd.DataFrame:
    """Sampled accuracy on the tuning problems at the end of each run."""
    import pandas as pd

    rows = []
    for (arm, rate, seed), job in tuning.items():
        found = Run(job.folder).evaluations
        last = found[found.how == "sampled"].iloc[-1]
        rows.append({"arm": arm, "learning_rate": rate, "seed": seed, "sampled": last["mean"]})
    return pd.DataFrame(rows)


def _choose(table: pd.DataFrame, console: Console) -> dict[str, float]:
    """The learning rate of each arm with the highest mean sampled accuracy on the tuning problems."""
    mean = table.groupby(["arm", "learning_rate"], sort=False)["sampled"].mean().unstack()
    chosen = {str(arm): float(rate) for arm, rate in mean.idxmax(axis=1).items()}
    for arm, rate in chosen.items():
        text = ", ".join(f"{r:g}: {100 * v:.1f} %" for r, v in mean.loc[arm].items())
        edge = rate in (mean.columns.min(), mean.columns.max()) and len(mean.columns) > 1
        console.print(
            f"{arm}: learning rate {rate:g} ({text})"
            + ("; at the edge of the grid, widen --tune" if edge else ""),
            soft_wrap=True,
        )
    return chosen


def _check(folder: Path, args: HAPOConfig, training: TrainOptions, arms: list[Arm]) -> None:
    """What can be known before anything is loaded."""
    if args.max_steps < 1:
        raise UsageError("compare needs max_steps: a run's length in optimiser steps")
    if not training.evaluate:
        raise UsageError("compare needs evaluate: arms are compared by held-out accuracy")
    for arm in arms:
        for name in ("use_vllm", "overlong_buffer"):
            if arm.of_trl and getattr(args, name):
                raise UsageError(f"arm {arm.label}: {TRL} arms run without {name}; drop it, or the arm")
    _check_folder(folder)


def _check_folder(folder: Path) -> None:
    if (folder / "manifest.json").exists():
        raise UsageError(f"{folder} is the folder of a run: choose another --output_dir for the comparison")
    check_writable(folder)


def _settle(
    argv: list[str],
    folder: Path,
    options: CompareOptions,
    task_config: TaskConfig,
    args: HAPOConfig,
    tune_size: int,
    arms: list[Arm],
) -> list[str]:
    """The flags of the recipe, whose file is copied so that every run reads the same.

    Raises:
        UsageError: an arm's options do not fit the recipe; too few training problems; the folder holds the
            comparison of another recipe.
    """
    config, words = _without(argv, options)
    task_config.task_seed = task_config.task_seed or 0
    task, _ = split_task(task_config, args.seed, tune_size)
    recipe = {} if config is None else read_recipe(config)
    plan = {"recipe": recipe, "flags": words, "tune_size": tune_size, "data": task.fingerprint}
    file, copy = folder / "compare.json", folder / "recipe.yaml"
    if file.is_file():
        before = json.loads(file.read_text())
        if different := [name for name in plan if before.get(name) != json.loads(json.dumps(plan[name]))]:
            raise UsageError(
                f"{folder} holds a comparison with another {' and '.join(different)}: choose another --output_dir"
            )
    write_whole(copy, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    words = words if config is None else ["--config", str(copy), *words]
    for arm in arms:
        if not arm.of_trl:
            parse_flags(words, {**arm.flags, "method": arm.name, "method_options": arm.options})
    write_whole(file, json.dumps(plan, indent=2) + "\n")
    return words


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One comparison at a time in a folder."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise UsageError(f"another `hapo compare` is at work in {folder}") from error


def _without(argv: list[str], options: CompareOptions) -> tuple[str | None, list[str]]:
    """The recipe's file, and the flags of the recipe alone."""
    own = {*vars(options), "no_ablation", "output_dir", "config"}
    kept: list[str] = []
    config, drop = None, False
    for at, word in enumerate(argv):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            drop = name in own
            if name == "config":
                config = value if equals else argv[at + 1]
        if not drop:
            kept.append(word)
    named = any(word.partition("=")[0].replace("-", "_") in ("--model", "--model_name_or_path") for word in kept)
    return (config or (None if named else DEFAULT)), kept
