"""Sets of demonstrations alone: what a model is to write, as messages, as prompt and completion, or as text."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from .config import REASONING_GYM, TaskConfig
from .data import (
    EVAL_SEED,
    GENERATED_TRAIN,
    HELD_OUT,
    _fingerprint,
    _hold_out,
    _with_usable_gold,
    _without,
    sample_rows,
    sources,
)
from .demonstrations import read_demonstrations
from .files import Row
from .rewards import RewardFunction, load_rewards, math_verify_reward

if TYPE_CHECKING:
    from datasets import Dataset

TRAINED_ON = ("messages", "prompt", "completion", "text")
"""Columns that TRL's trainer reads."""


@dataclass
class DemonstrationConfig(TaskConfig):
    """Where the demonstrations are, and how held-out answers are scored: a task's options, and a column of text.

    Raises:
        ValueError: a value that no data set could make right.
    """

    text_column: str = field(default="text", metadata={"help": "column with text, all of which is demonstration"})

    def _check_demonstrations(self) -> None:
        others = ("demonstrations", "demonstration_config", "demonstration_size", "curriculum")
        given = [name for name in others if getattr(self, name) is not None]
        if given or self.demonstration_split != TaskConfig.demonstration_split:
            name = (given or ["demonstration_split"])[0]
            raise ValueError(f"{name} is of hapo train; what hapo sft learns from is its dataset")


@dataclass(frozen=True)
class DemonstrationSet:
    """Demonstrations, ready for a trainer."""

    name: str
    train: Dataset
    eval: Dataset
    """Held out; with the columns of `train`: messages; prompt and completion; or text."""
    problems: Dataset | None
    """The held-out ones with prompt, question and answer, where the data have answers."""
    reward_funcs: list[RewardFunction]
    """What scores answers to `problems`."""
    fingerprint: str
    """SHA-256 of all rows, in order."""


def load_demonstrations(config: DemonstrationConfig, *, seed: int) -> DemonstrationSet:
    """Load the demonstrations that `config` names; `seed` chooses those to train on unless `task_seed` does.

    A source with a column of messages is read as conversations, else one with a completion as prompt and
    completion, else one with text as that. Held out is by content, as in `load_task`: a question that is held out,
    or a text without one, is not trained on.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no demonstrations, missing columns, a demonstration of another form, sizes that the data
            cannot fill, or gold answers that the rewards cannot use.
    """
    seed = seed if config.task_seed is None else config.task_seed
    train, evaluation, own = _rows(config, seed)
    rewards = load_rewards(config.rewards, own, config.reward_timeout, config.reward_fallback())
    if evaluation is None:
        train, evaluation = _hold_out(train, config.eval_size or HELD_OUT)
    else:
        train = _without(train, evaluation)
    train = sample_rows(train, config.train_size, seed, "train_size")
    evaluation = sample_rows(evaluation, config.eval_size, EVAL_SEED, "eval_size")
    answered = all("answer" in row for row in evaluation)
    problems = _with_usable_gold(evaluation, rewards, config, "held-out data") if answered else None
    return DemonstrationSet(
        name=config.dataset,
        train=_dataset(train, TRAINED_ON),
        eval=_dataset(evaluation, TRAINED_ON),
        problems=None
        if problems is None
        else _dataset([row | {"prompt": row["asked"]} for row in problems], None),
        reward_funcs=rewards,
        fingerprint=_fingerprint(train, evaluation),
    )


def _rows(config: DemonstrationConfig, seed: int) -> tuple[list[Row], list[Row] | None, RewardFunction]:
    if config.dataset.startswith(REASONING_GYM):
        raise ValueError(
            f"{config.dataset} has no demonstrations: its tasks are problems and answers alone. Take a data set "
            f"with the column {config.messages_column!r}, {config.completion_column!r} or {config.text_column!r}, "
            "or train on rewards with hapo train"
        )
    if config.dataset == "addition":
        from .addition import addition_reward, draw_problems, prompt, solution

        if config.chat or config.prompt_template != "{question}":
            raise ValueError("chat and prompt_template do not go with dataset addition: its model reads a+b= only")

        def made(a: int, b: int) -> Row:
            asked = {"prompt": prompt(a, b), "asked": prompt(a, b), "question": f"{a}+{b}"}
            return asked | {"completion": solution(a, b), "answer": str(a + b)}

        size = config.train_size or GENERATED_TRAIN
        train = draw_problems(random.Random(seed), size, evaluation=False)
        evaluation = draw_problems(random.Random(EVAL_SEED), config.eval_size or HELD_OUT, evaluation=True)
        return [made(*pair) for pair in train], [made(*pair) for pair in evaluation], addition_reward
    given = sources(config)
    read = partial(read_demonstrations, config=config, kinds=("messages", "completion", "text"), answers=True)
    evaluation_rows = None if given.evaluation is None else read(given.evaluation)
    return read(given.training), evaluation_rows, math_verify_reward(config.reward_timeout)


def _dataset(rows: list[Row], names: tuple[str, ...] | None) -> Dataset:
    from datasets import Dataset

    kept = names or ("prompt", "question", "answer", *(n for n in rows[0] if n not in (*TRAINED_ON, "asked")))
    return Dataset.from_list([{n: row[n] for n in dict.fromkeys(kept) if n in row} for row in rows])
