"""`hapo compare`: arms x seeds on one recipe, as paired runs, with intervals and a verdict in words."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..insight.run import Run
from ..outputs import check_made
from ..tasks import TaskConfig
from ..trl import HAPOConfig
from . import UsageError
from .arms import PLAN, TRL, Arm, Job, Recipe, content_of, parse_flags, split_task
from .finished import finished_runs, split_named
from .jobs import alone, check_jobs, check_no_run, find_gpus, make_room, run_all
from .model import AdaptedModelConfig
from .recipe import RecipeParser, read_recipe, recipe_of, without
from .train import TrainOptions, config_for, config_of, embedded_for

if TYPE_CHECKING:
    import pandas as pd

DESCRIPTION = """Compare methods on one recipe: same problems, initial weights and sampling seeds, paired by seed.
Takes the flags of `hapo train`, which hold for every arm; a recipe may also hold arms, seeds, tune and the other
options below. An arm is a method with options, hapo:components=BCD, or trl:LOSS_TYPE, TRL's own loss in TRL's own
trainer. Run again with the same output_dir it goes on where it was stopped; with more arms or seeds it adds them;
finished runs stay as they are. With --runs it trains nothing, and compares runs that are there."""

OUTPUT = "runs/compare"
"""Folder of a comparison that names none; a recipe's own is that of its run."""

ABLATION = (*(f"hapo:components={parts}" for parts in ("A", "B", "C", "D", "AB", "ABC")), "hapo")

FILES = (
    *("results.csv", "curves.csv", "comparison.md", "compare.html", "tuning.csv"),
    *(f"figures/{name}.svg" for name in ("accuracy", "differences", "seeds", "tuning")),
)
"""What `hapo.insight.compare_page` may write: looked at before hours of training, too."""

TRAINED = "runs"
"""What the tables of a comparison are made of that trains its runs: those in its folder."""

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
        self.tune = [float(rate) for rate in self.tune]  # YAML reads 1e-5, without a point, as text
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
    kind = config_of_arms(argv)
    kinds: list[type] = [TaskConfig, kind, AdaptedModelConfig, TrainOptions, CompareOptions]
    parser = RecipeParser("hapo compare", DESCRIPTION, kinds, embedded_for(kind))
    parser.set_defaults(run_records=True)
    parser.add_argument(
        "--replace",
        action="store_true",
        help="train finished runs anew that are not what is asked for, the old ones moved aside; write over "
        "tables that are there",
    )
    task_config, args, model_config, training, options, told = parser.read(argv)
    given = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    folder = Path(args.output_dir) if "output_dir" in given else Path(OUTPUT)
    console = Console(highlight=False, markup=False)
    if options.runs:
        return _compare_finished(folder, options, given, console)
    if "seed" in given:
        raise UsageError("the seeds of a comparison count up from --first_seed; drop --seed")
    arms = [Arm(label) for label in options.arms]
    _check(folder, args, model_config, training, arms)
    with alone(folder, "compare"):
        check_made(folder, FILES, TRAINED, told.replace)
        own = {*vars(options), "no_ablation", "output_dir", "config", "replace"}
        config, words = without(argv, own)
        model = model_config.model_name_or_path if given & {"model", "model_name_or_path"} else None
        of_runs = {k: v for k, v in recipe_of(config, model, embedded_for(kind)).items() if k not in vars(options)}
        recipe = Recipe(of_runs, words)
        return _compare(
            recipe, folder, task_config, args, model_config, training, options, arms, told.replace, console
        )


def config_of_arms(argv: list[str]) -> type[HAPOConfig]:
    """The class of the trainer's options, which all arms share.

    Raises:
        UsageError: some arms are methods of masked-diffusion models and others are not.
    """
    if "--arms" in argv:
        labels = list(takewhile(lambda word: not word.startswith("--"), argv[argv.index("--arms") + 1 :]))
    else:
        config, _ = without(argv, ())
        labels = read_recipe(config).get("arms", []) if config is not None else []
    kinds = {label: config_for(label.partition(":")[0]) for label in labels}
    if len(set(kinds.values())) > 1:
        some = ", ".join(label for label, kind in kinds.items() if kind is not HAPOConfig)
        raise UsageError(f"{some} train masked-diffusion models, and the other arms do not: compare them apart")
    return next(iter(kinds.values()), None) or config_of(argv)


def _compare_finished(folder: Path, options: CompareOptions, given: set[str], console: Console) -> int:
    """Compare runs that exist already."""
    if trained := sorted(given - {"runs", "reference", "target", "output_dir", "replace"}):
        raise UsageError(f"--runs trains nothing: drop {', '.join(f'--{name}' for name in trained)}")
    runs = finished_runs(options.runs)
    check_no_run(folder)
    if any(folder.glob(f"runs/*/*/{PLAN}")):
        raise UsageError(f"{folder} holds a comparison that trains its runs: choose another --output_dir")
    with alone(folder, "compare"):
        _conclude(runs, folder, options, None, None, "replace" in given, console)
    return 0


def _compare(
    recipe: Recipe,
    folder: Path,
    task_config: TaskConfig,
    args: HAPOConfig,
    model_config: AdaptedModelConfig,
    training: TrainOptions,
    options: CompareOptions,
    arms: list[Arm],
    replace: bool,
    console: Console,
) -> int:
    threads = training.threads or 1
    flags: dict[str, Any] = {
        "evaluate": True,
        "report": False,
        "save_strategy": "no",
        "save_steps": 500,
        "threads": threads,
    }
    why = ""
    if any(arm.of_trl for arm in arms) and args.max_num_gen_batches > 1:
        why = "TRL's trainer has no dynamic sampling: max_num_gen_batches is 1 in every arm"
        console.print(why)
        flags["max_num_gen_batches"] = 1
    if training.evaluate_every is None:
        flags["evaluate_every"] = max(1, args.max_steps // EVERY)
    at_once = options.jobs or len(find_gpus()) or max(1, (os.cpu_count() or 1) // threads)
    tune_size = options.tune_size if options.tune else 0
    content = _settle(recipe, task_config, args, model_config, tune_size, arms)

    def job(arm: Arm, seed: int, where: Path, rate: float | None = None, tuning: bool = False) -> Job:
        own = {**flags, **({} if rate is None else {"learning_rate": rate})}
        own |= {"evaluate_every": args.max_steps} if tuning else {}
        to = where / f"seed-{seed}"
        return Job(arm, seed, to, recipe, own, content, tune_size, tuning, starts=folder / "starts")

    def jobs(rates: dict[str, float]) -> dict[tuple[str, int], Job]:
        return {
            (arm.label, seed): job(arm, seed, folder / "runs" / arm.slug, rate=rates.get(arm.label))
            for seed in range(options.first_seed, options.first_seed + options.seeds)
            for arm in arms
        }

    rates: dict[str, float] = {}
    tuned = None
    if options.tune:
        seeds = range(options.first_seed + 1000, options.first_seed + 1000 + options.tune_seeds)
        tuning = {
            (arm.label, rate, seed): job(arm, seed, folder / "tuning" / arm.slug / f"{rate:g}", rate, tuning=True)
            for rate in options.tune
            for seed in seeds
            for arm in arms
            if "learning_rate" not in arm.flags
        }
        if not replace:  # before hours of tuning
            check_jobs(jobs({}).values(), folder, why, ignoring={"learning_rate"})
        make_room(tuning.values(), folder, why, replace, console)
        if not run_all(list(tuning.values()), at_once, "tuning", console):
            return 1
        if tuning:  # else every arm has a rate of its own
            tuned = _tuning_table(tuning)
            rates = _choose(tuned, console)
    runs = jobs(rates)
    make_room(runs.values(), folder, why, replace, console)
    complete = run_all(list(runs.values()), at_once, "runs", console)
    finished = {key: one.folder for key, one in runs.items() if one.done}
    _conclude(finished, folder, options, tuned, TRAINED, replace, console)
    return 0 if complete else 1


def _conclude(
    runs: dict[tuple[str, int], Path],
    folder: Path,
    options: CompareOptions,
    tuned: pd.DataFrame | None,
    of: str | None,
    replace: bool,
    console: Console,
) -> None:
    """Write the page and the tables; print the table of arms, the verdicts, and what cannot be shown."""
    from ..insight.compare import MEASURES, read_comparison
    from ..insight.compare_page import summary, write_comparison

    comparison = read_comparison(runs, str(options.reference), options.target)
    page = write_comparison(comparison, folder, tuned, of=of, replace=replace)
    found = summary(comparison)
    shown = [*(measure.title for measure in comparison.accuracies), "reached the target", "collapsed"]
    shown = [column for column in shown if column in found]
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


def _check(
    folder: Path, args: HAPOConfig, model: AdaptedModelConfig, training: TrainOptions, arms: list[Arm]
) -> None:
    """What can be known before anything is loaded."""
    if args.max_steps < 1:
        raise UsageError("compare needs max_steps: a run's length in optimiser steps")
    if not training.evaluate:
        raise UsageError("compare needs evaluate: arms are compared by held-out accuracy")
    if args.resume_from_checkpoint:
        raise UsageError("runs of a comparison begin anew: drop resume_from_checkpoint")
    if doubled := [one for one, n in Counter(arm.slug for arm in arms).items() if n > 1]:
        raise UsageError(f"two arms would share the folder {doubled[0]}: write one of them otherwise")
    for arm in arms:
        if arm.flags.get("max_num_gen_batches", 1) > 1 and any(other.of_trl for other in arms):
            raise UsageError(
                f"arm {arm.label}: max_num_gen_batches is 1 in every arm beside one of {TRL}, which has no "
                "dynamic sampling; drop it, or the arm of TRL's"
            )
        for name in ("use_vllm", "overlong_buffer"):
            if arm.of_trl and getattr(args, name):
                raise UsageError(f"arm {arm.label}: {TRL} arms run without {name}; drop it, or the arm")
        if arm.of_trl and model.gate_loss:
            raise UsageError(
                f"arm {arm.label}: TRL's trainer leaves the entropy of the gates out of its loss; set "
                "entropy_weight to 0 in gatera, or drop the arm"
            )
    check_no_run(folder)


def _settle(
    recipe: Recipe,
    task_config: TaskConfig,
    args: HAPOConfig,
    model_config: AdaptedModelConfig,
    tune_size: int,
    arms: list[Arm],
) -> dict[str, Any]:
    """What all runs are of, by content.

    Raises:
        UsageError: an arm's options do not fit the recipe; too few training problems.
    """
    task_config.task_seed = task_config.task_seed or 0
    task, _ = split_task(task_config, args.seed, tune_size)
    for arm in arms:
        if arm.of_trl and task.staged:
            raise UsageError(
                f"arm {arm.label!r}: TRL's trainer takes prompts in no order of stages; name a method of hapo's, "
                "or leave curriculum out"
            )
        if not arm.of_trl:
            parse_flags(recipe, {**arm.flags, "method": arm.name, "method_options": arm.options})
    return content_of(recipe, task, task_config, args, model_config)
