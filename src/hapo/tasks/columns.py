"""What of a data set's row becomes which column of a Task: problem, gold answer, and what rewards ask for."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

from .config import TaskConfig
from .files import Row

INSTEAD = {"question": "prompt", "answer": "reward_model.ground_truth"}
"""Columns that stand in for the default ones where these are missing: TRL's and verl's."""

OF_VERL = ("data_source", "ability", "reward_model", "extra_info")
"""Columns of a row of verl, which its rewards may ask for."""


def columns_of(tables: dict[str, list[Row]], config: TaskConfig) -> list[Row]:
    """The columns that the configuration names, under their names in a Task; the answer as it stands.

    `tables` are rows by the name of their source. A name with dots (reward_model.ground_truth) looks into
    objects. In the place of a missing question stands the column prompt, of a missing answer
    reward_model.ground_truth; then the row is one of verl, whose other columns go to the rewards.

    Raises ValueError for a source without rows, a missing column, a question that is neither text nor messages,
    and a column that is of one kind here and of another there.
    """
    rows: list[Row] = []
    same_kind = _kind_check()
    for source, table in tables.items():
        question, answer, extras = _names(source, table, config)
        for number, row in enumerate(table, 1):
            place = f"{source}, row {number}"
            problem = problem_columns(value_of(row, question), config, place)
            handed_on = {name: value_of(row, name) for name in extras}
            for name, value in ((question, value_of(row, question)), *handed_on.items()):
                same_kind(name, value, place)
            rows.append(problem | {"answer": _answer(value_of(row, answer), config)} | handed_on)
    return rows


def _answer(value: Any, config: TaskConfig) -> Any:
    """Where no reward reads it, no answer is the empty one."""
    return "" if value is None and not config.needs_answers else value


def value_of(row: Row, name: str) -> Any:
    """The value of a column, or within it: a.b is row["a"]["b"] where there is no column "a.b"; None for none."""
    if name in row or "." not in name:
        return row.get(name)
    outer, _, inner = name.partition(".")
    value = row.get(outer)
    return value_of(value, inner) if isinstance(value, dict) else None


def question_name(rows: list[Row], config: TaskConfig) -> str:
    """The column that holds the problems of these rows."""
    return _or_instead(config.question_column, "question", rows)


def answer_column(rows: list[Row], config: TaskConfig) -> str:
    """The column that holds the gold answers of these rows."""
    return _or_instead(config.answer_column, "answer", rows)


def _or_instead(name: str, default: str, rows: list[Row]) -> str:
    instead = INSTEAD[default]
    return instead if name == default and not _has(rows, name) and _has(rows, instead) else name


def _has(rows: list[Row], name: str) -> bool:
    return any(name in row or value_of(row, name) is not None for row in rows)


def _names(source: str, rows: list[Row], config: TaskConfig) -> tuple[str, str, list[str]]:
    """The columns with question and answer, and the further ones for the rewards."""
    if not rows:
        raise ValueError(f"{source}: no rows")
    question = question_name(rows, config)
    answer, extras = answer_column(rows, config), list(config.extra_columns)
    needed = {question, *extras, *([answer] if config.needs_answers else [])}
    missing = sorted(name for name in needed if not _has(rows, name))
    if missing:
        found = dict.fromkeys(name for row in rows for name in row)
        raise ValueError(
            f"{source}: no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, found))}. "
            "Set question_column, answer_column or extra_columns; a.b stands for key b of the objects in column a"
        )
    if answer == INSTEAD["answer"]:
        extras += [name for name in OF_VERL if name not in extras and _has(rows, name)]
    return question, answer, extras


def problem_columns(question: Any, config: TaskConfig, place: str) -> Row:
    """The columns prompt and question of a problem, which is text or messages.

    Text becomes what `prompt_template` and `chat` make of it. Messages stay as they are, but that the template
    is put around the last one, and `system_prompt` before all; their question is what they say, without the
    system's.
    """
    if isinstance(question, str) and question.strip():
        text = _templated(question, config)
        if not config.chat:
            return {"prompt": text, "question": question}
        return {"prompt": [*_system(config), {"role": "user", "content": text}], "question": question}
    if not _are_messages(question):
        raise ValueError(
            f"{place}: the question must be text, or a list of messages with role and text content that ends with "
            f"one of the user, not {question!r:.200}"
        )
    if config.system_prompt is not None and question[0]["role"] == "system":
        raise ValueError(f"{place}: the messages have a system message of their own; leave system_prompt out")
    *before, last = question
    if config.prompt_template != "{question}":
        last = {**last, "content": _templated(last["content"], config)}
    said = [message["content"] for message in question if message["role"] != "system" and message.get("content")]
    return {"prompt": [*_system(config), *before, last], "question": "\n\n".join(said)}


def _templated(question: str, config: TaskConfig) -> str:
    # str.format would trip over the braces of LaTeX in a template
    return config.prompt_template.replace("{question}", question)


def _system(config: TaskConfig) -> list[Row]:
    return [] if config.system_prompt is None else [{"role": "system", "content": config.system_prompt}]


def _are_messages(value: Any) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        return False
    return (
        all(isinstance(message.get("role"), str) for message in value)
        and all(isinstance(message.get("content"), str | None) for message in value)
        and value[-1]["role"] in ("user", "tool")
        and bool((value[-1].get("content") or "").strip())
    )


def _kind_check() -> Callable[[str, Any, str], None]:
    """A function of column, value and place that raises for the first value of another kind than those before."""
    first: dict[str, tuple[str, Any, str]] = {}

    def check(name: str, value: Any, place: str) -> None:
        if value is None:
            return
        kind = _kind(value)
        kind_there, value_there, there = first.setdefault(name, (kind, value, place))
        if kind != kind_there:
            raise ValueError(
                f"{place}: column {name!r} holds {kind} ({value!r:.60}), but {kind_there} ({value_there!r:.60}) "
                f"in {there}. Write the whole column as one kind, such as text"
            )

    return check


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float | Decimal):
        return "a number"
    kinds: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")
