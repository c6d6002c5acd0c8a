"""Environments: tasks of several turns, in the form that TRL's `environment_factory` takes.

A turn of the model is one text. The environment reads it with its one public method, answers with a text, which
the model sees before its next turn, and keeps the reward. The same class serves ETPO's loop and a trainer of
TRL's.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from datasets import Dataset

KNOWN = {"addition": "addition", "code": "code"}
"""Name -> module of this package, whose `load(seed, train_size, eval_size)` gives the class and two data sets."""


@runtime_checkable
class Environment(Protocol):
    """What an environment has, beside exactly one public method that takes a turn: `name(text: str) -> str`.

    That method has type hints and a docstring with an `Args:` section, from which TRL writes the tool's schema.
    Every other public function would be a second tool; `get_reward` is TRL's own name and none. A turn is
    deterministic: the same row and the same turns give the same answers and rewards, so that a resumed run can go
    through them again.
    """

    reward: float
    """Of the last turn; 0 before the first."""
    done: bool
    """The last turn ended the episode: no further turn is taken before `reset`."""
    max_turns: int
    """After so many turns the episode ends."""

    def reset(self, **row: Any) -> str | None:
        """Begin an episode with a row of the data set, whose columns come by name.

        Returns:
            What the model sees after the row's prompt; None where the prompt says it all.
        """
        ...


def tool_of(environment: Environment) -> Callable[[str], str]:
    """The method of an environment that takes a turn: the text of the model in, the text that it sees next out.

    Found as TRL finds it: the functions of the class whose names have no underscore in front, without `reset` and
    `get_reward`.

    Raises:
        TypeError: the environment lacks something that `Environment` names, or has no such method or several.
    """
    kind = type(environment).__name__
    if missing := [name for name in ("reward", "done", "max_turns", "reset") if not hasattr(environment, name)]:
        raise TypeError(f"environment {kind} has no {', '.join(missing)}: see hapo.tasks.environments.Environment")
    functions = inspect.getmembers(type(environment), predicate=inspect.isfunction)
    names = [name for name, _ in functions if name not in ("reset", "get_reward") and not name.startswith("_")]
    if len(names) != 1:
        raise TypeError(
            f"environment {kind} has the public methods {', '.join(names) or '(none)'} beside reset: it needs "
            "exactly one, which takes the text of a turn; begin the names of the others with an underscore"
        )
    tool: Callable[[str], str] = getattr(environment, names[0])
    return tool


@dataclass(frozen=True)
class EnvironmentTask:
    """An environment, and the rows that its episodes begin with: column `prompt`, and what `reset` reads."""

    name: str
    environment: Callable[..., Environment]
    train: Dataset
    eval: Dataset
    options: dict[str, Any] = field(default_factory=dict)
    """Of the environment's class."""

    def make(self) -> Environment:
        """An instance."""
        return self.environment(**self.options)


def load_environment(
    name: str, *, seed: int, train_size: int, eval_size: int, options: dict[str, Any] | None = None
) -> EnvironmentTask:
    """The environment of this name, or what MODULE:FUNCTION returns for seed, train_size and eval_size.

    Raises:
        ValueError: there is none, it takes no such options, or its rows have no prompt.
    """
    module, colon, function = name.partition(":")
    if not colon and name not in KNOWN:
        raise ValueError(f"there is no environment {name!r}; known: {', '.join(KNOWN)}, or name MODULE:FUNCTION")
    if colon and (not module or not function or module.startswith(".")):
        raise ValueError(f"environment {name!r} must be MODULE:FUNCTION, with the module's whole name")
    try:
        home = importlib.import_module(module) if colon else importlib.import_module(f".{KNOWN[name]}", __name__)
        load = getattr(home, function or "load")
        inspect.signature(load).bind(seed, train_size, eval_size)
    except (ModuleNotFoundError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"environment {name!r} cannot be loaded: {error}; its function takes seed, train_size and eval_size"
        ) from error
    made = load(seed, train_size, eval_size)
    if not isinstance(made, tuple | list) or len(made) != 3:
        raise ValueError(f"environment {name!r} must give a class and two data sets, got a {type(made).__name__}")
    environment, train, held_out = made
    task = EnvironmentTask(name, environment, train, held_out, dict(options or {}))
    try:
        tool_of(task.make())
    except TypeError as error:
        raise ValueError(f"environment {name!r} with the options {task.options}: {error}") from error
    for part, rows in (("train", train), ("eval", held_out)):
        if not len(rows) or "prompt" not in rows.column_names:
            raise ValueError(f"environment {name!r}: its {part} rows have no column prompt, or there are none")
    return task
