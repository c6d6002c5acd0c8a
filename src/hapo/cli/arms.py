"""The arms of a comparison, and what a run of one of them is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

from trl import GRPOConfig

import hapo

from ..engines.identity import differences
from ..insight.run import parse_arm
from ..methods import options_of, policy
from ..outputs import file_hash
from ..tasks import Task, TaskConfig, load_task
from ..tasks.answers import normalise
from ..tasks.reward_options import EMBEDDED
from ..trl import HAPOConfig
from . import UsageError, nearest
from .contents import model_identity, reward_identity
from .model import AdaptedModelConfig
from .recipe import RecipeParser
from .run_folder import model_path, named_model
from .train import TrainOptions, config_for

TRL = "trl:"
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


def _words(name: str, value: Any) -> list[str]:
    """A flag and its value, in one word where it is one, which may then begin with a minus."""
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict | bool) else value}"]
