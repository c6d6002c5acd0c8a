"""`hapo methods`: the list of methods, and the card of one."""

from __future__ import annotations

import argparse
import ast
import inspect
import textwrap
from dataclasses import fields

from rich import box
from rich.console import Console
from rich.table import Table

import hapo

from ..methods import Options, options_of
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


def _print_list(console: Console) -> None:
    table = Table(box=box.SIMPLE)
    for column in ("method", "year", "arXiv", "what it is"):
        table.add_column(column, no_wrap=column != "what it is")
    for name in hapo.methods():
        cls = options_of(name)
        table.add_row(name, str(cls.paper.year), cls.paper.arxiv, cls.summary)
    console.print(table)
    console.print("hapo methods NAME: stages, options and paper")


def _print_card(console: Console, name: str, cls: type[Options]) -> None:
    console.print(f"{name}: {cls.summary}", style="bold")
    console.print(f"{cls.paper.title} ({cls.paper.year}), https://arxiv.org/abs/{cls.paper.arxiv}")
    stages = Table(box=box.SIMPLE, title="stages", title_justify="left", show_header=False)
    for stage, choice in cls.stages.items():
        stages.add_row(stage, choice)
    console.print(stages)
    options = Table(box=box.SIMPLE, title="options (method_options)", title_justify="left")
    for column in ("option", "default", "meaning"):
        options.add_column(column, no_wrap=column != "meaning")
    docs = option_docs(cls)
    for f in fields(cls):
        options.add_row(f.name, repr(f.default), docs.get(f.name, ""))
    console.print(options)
