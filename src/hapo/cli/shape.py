"""`hapo shape`: the mixture of attributions that makes the best reward per token, found by trials."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from ..insight.compare import read_comparison
from ..insight.compare_page import write_comparison
from ..insight.shape_page import Found, picture_files, verdict
from ..outputs import check_made
from ..tasks import TaskConfig
from ..tasks.reward_options import TokenRewardOptions
from ..tasks.search import GaussianProcess, propose
from ..trl import HAPOConfig
from . import UsageError
from .arms import Arm, Recipe, content_of, parse_flags, split_task
from .compare import EVERY, FILES
from .jobs import alone, check_no_run, find_gpus, make_room, run_all
from .model import AdaptedModelConfig
from .recipe import RecipeParser, recipe_of, without
from .run_folder import prepare_process
from .train import TrainOptions, check_token_reward
from .trials import CONFIRMED, PLANNED, RECORD, SPARSE, Search, trials_of

DESCRIPTION = """The weights that mix attributions of a reward model's score into rewards per token, found by
Bayesian optimisation (arXiv 2504.16272). Takes a recipe of `hapo train` with token_reward and without its weights;
each trial is such a training run, judged by its held-out score of whole answers. The best weights are then trained
again beside the sparse reward, on fresh seeds. Stopped, it goes on where it was; with more trials it adds them.
Alone: the embedded example."""

OUTPUT = "runs/shape"
DEFAULT = "shape"
"""The embedded recipe."""

PAGE, WEIGHTS = "shape.html", "weights.yaml"
PICTURES = tuple(f"figures/{name}.svg" for name in ("simplex", "deviation", "slices", "trials"))


@dataclass
class ShapeOptions:
    """What `hapo shape` takes beside a recipe."""

    trials: int = field(default=12, metadata={"help": "training runs of the search"})
    initial: int | None = field(
        default=None,
        metadata={
            "help": "trials before the Gaussian process chooses: each channel alone, then points that fill the "
            "simplex evenly (default: twice the channels)"
        },
    )
    search_size: int = field(
        default=200, metadata={"help": "problems taken out of the training data, by which trials are judged"}
    )
    confirm: int = field(
        default=8,
        metadata={"help": "fresh paired seeds on which the best weights meet the sparse reward; 0 leaves it out"},
    )
    first_seed: int = field(default=1, metadata={"help": "the seeds of the trials count up from here"})
    jobs: int | None = field(
        default=None, metadata={"help": "runs at once (default: one a GPU; else cores / threads of a run)"}
    )

    def __post_init__(self) -> None:
        for name, least in (("trials", 1), ("initial", 1), ("search_size", 1), ("confirm", 0), ("jobs", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


def main(argv: list[str]) -> int:
    """Search, confirm, and return the exit code: 1 where a run of the confirmation failed."""
    kinds = [TaskConfig, HAPOConfig, AdaptedModelConfig, TrainOptions, ShapeOptions]
    parser = RecipeParser("hapo shape", DESCRIPTION, kinds, default=DEFAULT)
    parser.set_defaults(run_records=True)
    parser.add_argument("--replace", action="store_true", help="begin anew, the search that is there moved aside")
    task_config, args, model_config, training, options, given = parser.read(argv)
    named = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    folder = Path(args.output_dir) if "output_dir" in named else Path(OUTPUT)
    console = Console(highlight=False, markup=False)
    if "seed" in named:
        raise UsageError("the seeds of a search count up from --first_seed; drop --seed")
    shape = _check(task_config, args, training, options)
    check_no_run(folder)
    with alone(folder, "shape"):
        config, words = without(argv, {*vars(options), "output_dir", "config", "replace"})
        model = model_config.model_name_or_path if named & {"model", "model_name_or_path"} else None
        recipe = Recipe(recipe_of(config, model, DEFAULT), words)
        search = _search(recipe, folder, task_config, args, model_config, training, options, shape)
        search.begin([RECORD, PLANNED, PAGE, WEIGHTS, *PICTURES], given.replace, console)
        check_made(folder / CONFIRMED, FILES, search.of)
        return _find(search, options, console)


def _check(
    task_config: TaskConfig, args: HAPOConfig, training: TrainOptions, options: ShapeOptions
) -> TokenRewardOptions:
    """What can be known before anything is loaded."""
    if task_config.token_reward is None:
        raise UsageError(
            "the recipe has no token_reward: name the reward model and the channels that are to be mixed, as in "
            "token_reward: {model: reward_tiny, channels: [shap, lime, sparse]}"
        )
    shape = TokenRewardOptions.read(task_config.token_reward)
    channels = len(shape.channels)
    if shape.weights is not None:
        raise UsageError("weights is what this command finds: leave it out of token_reward")
    if channels < 2:
        raise UsageError(f"token_reward has the channel {shape.channels[0]} alone: a mixture needs two at least")
    if options.initial is None:
        options.initial = 2 * channels
    if options.initial < channels or options.trials < channels:
        raise UsageError(
            f"{options.trials} trials, {options.initial} of them initial: each of the {channels} channels is "
            f"tried alone, so set both to {channels} at least"
        )
    if args.max_steps < 1:
        raise UsageError("shape needs max_steps: the length of a trial in optimiser steps")
    if not training.evaluate:
        raise UsageError("shape needs evaluate: trials are judged by their held-out score")
    if args.resume_from_checkpoint:
        raise UsageError("trials begin anew: drop resume_from_checkpoint")
    return shape


def _search(
    recipe: Recipe,
    folder: Path,
    task_config: TaskConfig,
    args: HAPOConfig,
    model_config: AdaptedModelConfig,
    training: TrainOptions,
    options: ShapeOptions,
    shape: TokenRewardOptions,
) -> Search:
    """The search, when data and options are known to go together.

    Raises:
        UsageError: they do not; too few training problems.
    """
    channels, threads = tuple(shape.channels), training.threads or 1
    prepare_process(threads)
    assert isinstance(task_config.token_reward, dict | str) and options.initial is not None
    reward: dict[str, Any] = (
        json.loads(task_config.token_reward)
        if isinstance(task_config.token_reward, str)
        else dict(task_config.token_reward)
    )
    reward["channels"] = list(channels)
    propose([], len(channels), options.initial, options.first_seed)
    task_config.task_seed = task_config.task_seed or 0
    task, _ = split_task(task_config, args.seed, options.search_size)
    check_token_reward(task, args)
    flags: dict[str, Any] = {
        "evaluate": True,
        "report": False,
        "save_strategy": "no",
        "save_steps": 500,
        "threads": threads,
    }
    method_options = args.method_options or {}
    assert isinstance(method_options, dict)
    label = ",".join(f"{name}={json.dumps(value)}" for name, value in method_options.items())
    arm = Arm(f"{args.method}:{label}")
    parse_flags(recipe, {**flags, "token_reward": {**reward, "weights": [1 / len(channels)] * len(channels)}})
    return Search(
        folder,
        channels,
        reward,
        arm,
        recipe,
        flags={**flags, "evaluate_every": args.max_steps},
        confirming={**flags, "evaluate_every": training.evaluate_every or max(1, args.max_steps // EVERY)},
        content=content_of(recipe, task, task_config, args, model_config),
        size=options.search_size,
        initial=options.initial,
        seed=options.first_seed,
        at_once=options.jobs or len(find_gpus()) or max(1, (os.cpu_count() or 1) // threads),
    )


def _find(search: Search, options: ShapeOptions, console: Console) -> int:
    """The trials, the page after each of them, and the confirmation."""
    page = search.folder / PAGE
    done = len(search.lines())
    known = f", {done} of them made already" if done else ""
    mixed = ", ".join(search.channels)
    console.print(f"weights of {mixed}: {options.trials} trials{known}; page: {page}", soft_wrap=True)
    _check_alive(search)
    while search.proceed(options.trials, console):
        _check_alive(search)
        if len(search.lines()) >= search.initial:
            _write(search, None)
    found = _write(search, None)
    console.print(_table(found))
    weights = found.best["weights"]
    complete = True
    if options.confirm and dict(zip(search.channels, weights, strict=True)).get(SPARSE) == 1:
        console.print("the best weights are the sparse reward's: there is nothing to confirm")
    elif options.confirm:
        complete, words = _confirm(search, options.confirm, tuple(weights), console)
        _write(search, words)
        console.print(words, soft_wrap=True)
    console.print(f"page: {page}; trials: {RECORD}, weights for a recipe: {WEIGHTS} beside it", soft_wrap=True)
    return 0 if complete else 1


def _check_alive(search: Search) -> None:
    """Raise a RuntimeError where each channel alone was tried, and every trial failed."""
    lines = search.lines()
    if len(lines) >= len(search.channels) and all(line["value"] is None for line in lines):
        raise RuntimeError(
            f"all {len(lines)} trials failed; the first says: {lines[0]['error']}. Mend the recipe, and begin "
            "anew with --replace"
        )


def _write(search: Search, confirmed: str | None) -> Found:
    """The page, its figures, and the best weights as an option of a recipe."""
    lines = search.lines()
    found = Found(search.channels, lines, GaussianProcess(trials_of(lines)), confirmed)
    weights = {"token_reward": {**search.reward, "weights": found.best["weights"]}}
    files: dict[str, str | bytes] = {PAGE: found.page, WEIGHTS: yaml.safe_dump(weights, sort_keys=False)}
    search.write({**picture_files(found), **files})
    return found


def _confirm(search: Search, seeds: int, weights: tuple[float, ...], console: Console) -> tuple[bool, str]:
    """Whether all runs came to their end, and what they show."""
    jobs = search.confirmation(weights, seeds)
    make_room(jobs.values(), search.folder, "", False, console)
    complete = run_all(list(jobs.values()), search.at_once, "confirmation", console)
    finished = {key: job.folder for key, job in jobs.items() if job.done}
    if not any(arm == SPARSE for arm, _ in finished):
        return False, "confirmation: no run of the sparse reward came to its end"
    comparison = read_comparison(finished, SPARSE)
    write_comparison(comparison, search.folder / CONFIRMED, of=search.of)
    return complete, f"confirmation: {verdict(comparison)}"


def _table(found: Found) -> Table:
    """The best weights against each channel alone, as the Gaussian process has them."""
    table = Table("", *found.channels, "measured", "expected", box=box.SIMPLE)
    for name, at in found.rows.items():
        line = found.lines[at]
        measured = "failed" if line["value"] is None else found.score(line["value"])
        expected = f"{found.score(found.mean(at))} ± {found.score(2 * found.deviation(at))}"
        table.add_row(name, *(f"{w:.2f}" for w in line["weights"]), measured, expected)
    return table
