"""Demonstrations to learn from beside rollouts: read as training problems are, each with its answer in full."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Any

from .answers import normalise
from .columns import problem_columns, question_name, value_of
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
    return [row for name, table in tables.items() for row in _rows(name, table, config)]


def _rows(source: str, table: list[Row], config: TaskConfig) -> list[Row]:
    """The rows of one file or split; conversations where no column is the answer."""
    if not table:
        raise ValueError(f"{source}: no rows")
    question, answer = question_name(table, config), config.demonstration_column
    found = dict.fromkeys(name for row in table for name in row)
    if "messages" in found and answer not in found:
        pairs: list[tuple[Any, Any]] = [_cut(row["messages"]) for row in table]
    elif all(any(value_of(row, name) is not None for row in table) for name in (question, answer)):
        pairs = [(value_of(row, question), value_of(row, answer)) for row in table]
    else:
        raise ValueError(
            f"{source}: a demonstration has a column {question!r} and one {answer!r}, or messages; there are "
            f"{', '.join(map(repr, found))}. Set question_column and demonstration_column"
        )
    rows = []
    for number, (asked, answered) in enumerate(pairs, 1):
        place = f"{source}, row {number}"
        if not (isinstance(answered, str) and answered.strip()):
            raise ValueError(f"{place}: the answer of a demonstration must be text, not {answered!r:.200}")
        row = problem_columns(asked, config, place)
        says = [{"role": "assistant", "content": answered}]
        rows.append(row | {"completion": answered if isinstance(row["prompt"], str) else says})
    return rows


def _cut(messages: Any) -> tuple[Any, Any]:
    """Messages up to the answer, and the answer; the latter None where they do not end with one."""
    if not (isinstance(messages, list) and messages and isinstance(messages[-1], dict)):
        return messages, None
    last = messages[-1]
    return messages[:-1], last.get("content") if last.get("role") == "assistant" else None
