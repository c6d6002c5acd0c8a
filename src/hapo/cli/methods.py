"""`hapo methods`: the list of methods, and the card of one."""

from __future__ import annotations

import argparse
import ast
import inspect
import textwrap
from dataclasses import fields
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import hapo

from ..methods import AdaptiveTemperature, ClippedOptions, Options, options_of
from . import UsageError


def main(argv: list[str]) -> int:
    """Print the table of methods, or the card of the one that is named."""
    parser = argparse.ArgumentParser(prog="hapo methods", description="Methods that `--method NAME` takes.")
    parser.add_argument("name", nargs="?", help="show its stages, options and paper")
    name = parser.parse_args(argv).name
    console = Console(highlight=False, markup=False)
    if name is None:
        _print_list(console)
        return 0
    try:
        options = options_of(name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    _print_card(console, name, options)
    return 0


def option_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass and its bases, by name of the field."""
    docs: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if "__dataclass_fields__" in vars(c)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                docs[statement.target.id] = " ".join(str(below.value.value).split())
    return docs


def differences(cls: type[Options]) -> dict[str, str]:
    """The stages in which a method differs from GRPO, with its choice: "none" where it leaves GRPO's out."""
    base = options_of("grpo").stages
    stages = {**cls.stages, **{stage: "none" for stage in base if stage not in cls.stages}}
    return {stage: choice for stage, choice in stages.items() if choice != base.get(stage)}


def defaults(cls: type[Options]) -> dict[str, Any]:
    """The options of a method with their defaults: first those that set it apart, then the shared ones."""
    built = cls()
    values = {f.name: getattr(built, f.name) for f in fields(cls)}
    return {**_own(values), **values}


def _own(values: dict[str, Any]) -> dict[str, Any]:
    """Without the options of every method, or of every clipped one, that stand at their common default."""
    shared = {f.name: f.default for f in fields(ClippedOptions)}
    return {name: value for name, value in values.items() if name not in shared or value != shared[name]}


def _text(value: Any) -> str:
    """A default as one writes it in Python; a temperature law by its strength, the rest being its defaults."""
    return repr({"tau": value.tau} if isinstance(value, AdaptiveTemperature) else value)


def _print_list(console: Console) -> None:
    table = Table(box=box.SIMPLE, leading=1)
    for column in ("method", "year", "arXiv", "what it is"):
        table.add_column(column, no_wrap=column != "what it is")
    for name in hapo.methods():
        cls = options_of(name)
        stages = [f"no {stage}" if how == "none" else stage for stage, how in differences(cls).items()]
        own = [f"{option}={_text(value)}" for option, value in _own(defaults(cls)).items()]
        what = Text(cls.summary)
        what.append(f"\nstages: {', '.join(stages) or 'the reference of this list'}", style="cyan")
        what.append(f"\n{', '.join(own)}", style="dim")
        table.add_row(name, str(cls.paper.year), cls.paper.arxiv, what)
    console.print(table)
    console.print("stages: where it differs from GRPO; below them, its own options at their defaults")
    console.print("hapo methods NAME: stages, all options and their meaning, paper")


def _print_card(console: Console, name: str, cls: type[Options]) -> None:
    console.print(f"{name}: {cls.summary}", style="bold")
    console.print(f"{cls.paper.title} ({cls.paper.year})")
    console.print(f"https://arxiv.org/abs/{cls.paper.arxiv}")
    for broken in sorted(hapo.method(name).breaks):
        console.print(f"breaks the {broken} law by its definition (docs/laws.md)")
    stages = Table(box=box.SIMPLE, title="stages (* differs from GRPO)", title_justify="left", show_header=False)
    differs = differences(cls)
    for stage, choice in {**cls.stages, **differs}.items():
        stages.add_row(f"{stage} *" if stage in differs else stage, choice)
    console.print(stages)
    _print_options(console, "options (method_options), its own first", defaults(cls), option_docs(cls))
    law = {f.name: f.default for f in fields(AdaptiveTemperature)}
    _print_options(console, "keys of the option temperature", law, option_docs(AdaptiveTemperature))


def _print_options(console: Console, title: str, values: dict[str, Any], docs: dict[str, str]) -> None:
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for column in ("option", "default", "meaning"):
        table.add_column(column, no_wrap=column != "meaning")
    for option, value in values.items():
        table.add_row(option, _text(value), docs[option])
    console.print(table)
