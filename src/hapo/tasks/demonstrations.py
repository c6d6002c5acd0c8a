"""Demonstrations, read as problems are, each with its answer in full; those to learn from beside rollouts."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Any

from .answers import normalise
from .columns import answer_column, problem_columns, question_name, value_of
from .config import REASONING_GYM, TaskConfig
from .files import Row, is_local, read_hub, read_local
from .table import dataset_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from datasets import Dataset

logger = logging.getLogger(__name__)

WORKED_SUMS = 4096
"""Demonstrations of the embedded task where demonstration_size is not given."""


def load_demonstrations(config: TaskConfig, evaluation: Iterable[str], *, seed: int) -> Dataset | None:
    """The demonstrations that `config` names, None for none: columns prompt, completion and question.

    Prompts are made as those of the training problems are, and a completion is of the same kind, text or messages.
    A demonstration of a question in `evaluation`, up to case and white space, is left out. `seed` chooses
    `demonstration_size` of them.

    Raises FileNotFoundError for a missing file, and ValueError for missing columns, an answer that is no text, a
    source without answers in full, and where none is left.
    """
    source = config.demonstrations
    if source is None:
        return None
    if source.startswith(REASONING_GYM):
        raise ValueError(f"demonstrations: {source} has no answers in full; name a file or a data set with some")
    rows = _worked_sums(config, seed) if source == "addition" else _read(source, config)
    held_out = {normalise(question) for question in evaluation}
    kept = [row for row in rows if normalise(row["question"]) not in held_out]
    if len(kept) < len(rows):
        logger.warning(
            "%s: dropped %d of %d demonstrations whose questions are evaluation questions",
            source, len(rows) - len(kept), len(rows),
        )  # fmt: skip
    if not kept:
        raise ValueError(f"demonstrations: of the {len(rows)} of {source} all are evaluation questions")
    size = config.demonstration_size
    if size is not None and size > len(kept):
        raise ValueError(f"demonstration_size is {size}, but there are {len(kept)} rows; lower it")
    chosen = range(len(kept)) if size is None else sorted(random.Random(seed).sample(range(len(kept)), size))
    return dataset_of([kept[i] for i in chosen])


def _worked_sums(config: TaskConfig, seed: int) -> list[Row]:
    from .addition import draw_problems, prompt, solution

    problems = draw_problems(random.Random(seed), config.demonstration_size or WORKED_SUMS, evaluation=False)
    return [{"prompt": prompt(a, b), "completion": solution(a, b), "question": f"{a}+{b}"} for a, b in problems]


def _read(source: str, config: TaskConfig) -> list[Row]:
    split = config.demonstration_split
    if is_local(source):
        tables = read_local(source, split)
    else:
        tables = {f"{source}, split {split}": read_hub(source, config.demonstration_config, split)}
    rows = read_demonstrations(tables, config, ("messages", "completion"))
    return [_after_prompt(row, source) for row in rows]


def _after_prompt(row: Row, source: str) -> Row:
    """The columns prompt, completion and question; of messages the last one is the completion."""
    if "messages" in row:
        if not row["asked"]:
            raise ValueError(
                f"{source}: a demonstration beside rollouts needs a question, got {row['messages']!r:.200}"
            )
        row = row | {"prompt": row["asked"], "completion": row["messages"][-1:]}
    return {name: row[name] for name in ("prompt", "completion", "question")}


def read_demonstrations(
    tables: dict[str, list[Row]], config: TaskConfig, kinds: tuple[str, ...], *, answers: bool = False
) -> list[Row]:
    """The rows of all sources, of the first of these kinds that a source has a column of.

    Kinds are messages, completion (beside a prompt) and text: the columns that a row then has, and question, and
    "asked", the prompt of a problem. With `answers` also answer and `extra_columns`, where a source has answers.

    Raises:
        ValueError: no rows, no column of any kind, or a demonstration of another form; the place and the remedy.
    """
    found = []
    for source, rows in tables.items():
        if not rows:
            raise ValueError(f"{source}: no rows")
        names = ", ".join(map(repr, dict.fromkeys(name for row in rows for name in row)))
        columns = {kind: getattr(config, f"{kind}_column") for kind in kinds}
        kind = next((kind for kind, column in columns.items() if _has(rows, column)), None)
        if kind is None:
            beside = [
                f"{k}_column (beside question_column)" if k == "completion" else f"{k}_column" for k in kinds
            ]
            raise ValueError(
                f"{source}: no demonstrations: it has none of the columns {_listed(map(repr, columns.values()))}, "
                f"but {names}. Set {_listed(beside, 'or')}"
            )
        answer, question = answer_column(rows, config), question_name(rows, config)
        answered = answers and kind != "text" and _has(rows, answer)
        needed = [*(config.extra_columns if answers else []), *([question] if kind == "completion" else [])]
        if missing := [name for name in needed if not _has(rows, name)]:
            raise ValueError(f"{source}: no column {', '.join(map(repr, missing))}; it has {names}")
        for number, row in enumerate(rows, 1):
            made = _demonstration(kind, row, columns[kind], question, config, f"{source}, row {number}")
            if answered:
                made |= {"answer": value_of(row, answer)} | {n: value_of(row, n) for n in config.extra_columns}
            found.append(made)
    return found


def _has(rows: list[Row], name: str) -> bool:
    return any(value_of(row, name) is not None for row in rows)


def _listed(names: Iterable[str], word: str = "and") -> str:
    *most, last = names
    return f"{', '.join(most)} {word} {last}" if most else last


def _demonstration(kind: str, row: Row, column: str, question: str, config: TaskConfig, place: str) -> Row:
    value = value_of(row, column)
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
