"""Options of a command: a YAML recipe and flags over it, as in TRL."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from ..assets import ASSETS, MODELS, embedded
from . import UsageError, nearest

DEFAULT = "demo"


class RecipeParser(TrlParser):
    """TRL's parser of dataclasses, with `--config NAME_OR_PATH` and messages that name the nearest flag.

    A recipe holds values of flags. Flags win over the recipe, the recipe wins over defaults. With neither
    `--config` nor `--model` it is the embedded recipe `default`.
    """

    def __init__(self, prog: str, description: str, kinds: list[type], default: str = DEFAULT) -> None:
        self.default = default
        super().__init__(kinds, prog=prog, description=description, allow_abbrev=False)
        self.add_argument(
            "--config",
            help=f"recipe: a YAML file, or the name of an embedded one ({', '.join(embedded())}); "
            f"{default} where neither --config nor --model is given",
        )
        self.add_argument(
            "--model",
            dest="model_name_or_path",
            default=None,
            help=f"model_name_or_path; embedded: {', '.join(MODELS)}",
        )

    def read(self, argv: list[str], recipe: dict[str, Any] | None = None) -> tuple[Any, ...]:
        """The dataclasses, in their order, and a namespace of the other arguments.

        Args:
            argv: the flags.
            recipe: what the recipe's file holds, in place of one that the flags name.

        Raises:
            UsageError: unknown flag or key, with the nearest one; a value of the wrong type, or out of range; no
                such recipe, or malformed YAML.
        """
        given, unknown = self.parse_known_args(argv)
        if unknown:
            raise UsageError(self._unknown(unknown[0]))
        if recipe is None:
            recipe = recipe_of(given.config, given.model_name_or_path, self.default)
        for key in recipe:
            if key not in self._names():
                raise UsageError(
                    f"{given.config or self.default}: unknown option {key!r}{nearest(key, self._names())}"
                )
        self.set_defaults_with_config(**recipe)
        try:
            return self.parse_args_into_dataclasses(argv, look_for_args_file=False)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def told(self, argv: list[str], recipe: dict[str, Any]) -> dict[str, Any]:
        """The options that flags and recipe set to other than their defaults, as one reads them."""
        default = vars(self.parse_known_args([])[0])
        self.set_defaults_with_config(**recipe)
        return {k: _value(v) for k, v in vars(self.parse_known_args(argv)[0]).items() if v != default[k]}

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage, which has hundreds of flags."""
        raise UsageError(message)

    def _names(self) -> list[str]:
        return [f.name for kind in self.dataclass_types for f in fields(kind) if f.init]

    def _unknown(self, word: str) -> str:
        if not word.startswith("-"):
            return f"unexpected argument {word!r}"
        flags = [flag for action in self._actions for flag in action.option_strings]
        return f"unknown flag {word}{nearest(word.partition('=')[0], flags)}"


def without(argv: list[str], own: Collection[str]) -> tuple[str | None, list[str]]:
    """The recipe's file that these arguments name, and the arguments without the flags `own`."""
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
    return config, kept


def recipe_of(config: str | None, model: str | None, default: str = DEFAULT) -> dict[str, Any]:
    """The recipe of this name or file; the embedded default where neither it nor a model is named.

    Raises:
        UsageError: see `read_recipe`.
    """
    if config is None and model is not None:
        return {}
    return read_recipe(config or default)


def read_recipe(name: str) -> dict[str, Any]:
    """The mapping in a YAML file, or in the embedded recipe of that name.

    Raises:
        UsageError: there is none, or it is no YAML mapping.
    """
    path = ASSETS / f"{name}.yaml" if name in embedded() else Path(name)
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(embedded())
        raise UsageError(f"cannot read the recipe {name} ({error.strerror}); embedded recipes: {known}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{where}: malformed YAML ({getattr(error, 'problem', error)})") from error
    if not isinstance(recipe, dict):
        raise UsageError(f"{path}: a recipe is a mapping of options to values, this is {recipe!r:.60}")
    return recipe


def told(*configs: Any) -> dict[str, Any]:
    """The options of some dataclasses that differ from their defaults."""
    options = {}
    for config in configs:
        for f in fields(config):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if getattr(config, f.name) != default:
                options[f.name] = getattr(config, f.name)
    return options


def _value(value: Any) -> Any:
    """A mapping given as JSON is that mapping."""
    try:
        return json.loads(value) if isinstance(value, str) and value.startswith("{") else value
    except ValueError:
        return value
