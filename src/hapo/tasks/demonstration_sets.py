"""Sets of demonstrations alone: what a model is to write, as messages, as prompt and completion, or as text."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .columns import answer_column, problem_columns, question_name, value_of
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
from .files import Row
from .rewards import RewardFunction, load_rewards, math_verify_reward

if TYPE_CHECKING:
    from datasets import Dataset

TRAINED_ON = ("messages", "prompt", "completion", "text")
"""Columns that TRL's trainer reads."""


@dataclass
class DemonstrationConfig(TaskConfig):
    """Where the demonstrations are, and how held-out answers are scored: the options of a task, and three columns.

    Raises:
        ValueError: a value that no data set could make right.
    """

    messages_column: str = field(
        default="messages",
        metadata={"help": "column with a whole conversation, the demonstration its last message"},
    )
    completion_column: str = field(
        default="completion", metadata={"help": "column with what the model is to write after question_column"}
    )
    text_column: str = field(default="text", metadata={"help": "column with text, all of which is demonstration"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("demonstrations", "curriculum"):
            if getattr(self, name) is not None:
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
    evaluation_rows = None if given.evaluation is None else _read(given.evaluation, config)
    return _read(given.training, config), evaluation_rows, math_verify_reward(config.reward_timeout)


def _read(tables: dict[str, list[Row]], config: DemonstrationConfig) -> list[Row]:
    """The rows of all sources, in the columns of `DemonstrationSet`; "asked" is the prompt of a problem."""
    found = []
    for source, rows in tables.items():
        if not rows:
            raise ValueError(f"{source}: no rows")
        names = dict.fromkeys(name for row in rows for name in row)
        kind = next(
            (k for k in ("messages", "completion", "text") if _has(rows, getattr(config, f"{k}_column"))), None
        )
        if kind is None:
            raise ValueError(
                f"{source}: no demonstrations: it has none of the columns {config.messages_column!r}, "
                f"{config.completion_column!r} and {config.text_column!r}, but {', '.join(map(repr, names))}. "
                "Set messages_column, completion_column (beside question_column) or text_column"
            )
        answer = answer_column(rows, config)
        answered = kind != "text" and _has(rows, answer)
        question = question_name(rows, config)
        needed = [*config.extra_columns, *([question] if kind == "completion" else [])]
        if missing := [name for name in needed if not _has(rows, name)]:
            raise ValueError(
                f"{source}: no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, names))}"
            )
        for number, row in enumerate(rows, 1):
            place = f"{source}, row {number}"
            made = _demonstration(kind, row, question, config, place)
            if answered:
                made |= {"answer": value_of(row, answer)} | {n: value_of(row, n) for n in config.extra_columns}
            found.append(made)
    return found


def _has(rows: list[Row], name: str) -> bool:
    return any(value_of(row, name) is not None for row in rows)


def _demonstration(kind: str, row: Row, question: str, config: DemonstrationConfig, place: str) -> Row:
    value = value_of(row, getattr(config, f"{kind}_column"))
    if kind == "text":
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{place}: the text must not be empty, got {value!r:.200}")
        return {"text": value, "question": value}
    if kind == "messages":
        _check_conversation(value, place)
        problem = problem_columns(value[:-1], config, place) if len(value) > 1 else {"prompt": [], "question": ""}
        return {
            "messages": [*problem["prompt"], value[-1]],
            "asked": problem["prompt"],
            "question": problem["question"] or value[-1]["content"],
        }
    problem = problem_columns(value_of(row, question), config, place)
    if isinstance(value, list):
        _check_conversation(value, place)
    elif not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: the completion must be text or messages, got {value!r:.200}")
    if isinstance(value, str) and not isinstance(problem["prompt"], str):
        value = [{"role": "assistant", "content": value}]
    if isinstance(value, list) and isinstance(problem["prompt"], str):
        raise ValueError(f"{place}: the completion is messages and the question is text: set chat to true")
    return {**problem, "asked": problem["prompt"], "completion": value}


def _check_conversation(value: Any, place: str) -> None:
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(message, dict) for message in value)
        or value[-1].get("role") != "assistant"
        or not isinstance(value[-1].get("content"), str)
    ):
        raise ValueError(
            f"{place}: a demonstration is a list of messages that ends with text of the assistant, got "
            f"{value!r:.200}"
        )


def _dataset(rows: list[Row], names: tuple[str, ...] | None) -> Dataset:
    from datasets import Dataset

    kept = names or ("prompt", "question", "answer", *(n for n in rows[0] if n not in (*TRAINED_ON, "asked")))
    return Dataset.from_list([{n: row[n] for n in dict.fromkeys(kept) if n in row} for row in rows])
