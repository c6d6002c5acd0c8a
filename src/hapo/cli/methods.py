"""`hapo methods`: the list of methods and of what stands beside them, and the card of one."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..companions import COMPANIONS, Companion
from . import UsageError
from .cards import REFERENCE, Card, cards, make_card


def main(argv: list[str]) -> int:
    """Print the table of methods, or the card of the one that is named."""
    parser = argparse.ArgumentParser(prog="hapo methods", description="Methods, adapters, optimisers and agents.")
    parser.add_argument("name", nargs="?", help="show its stages, options and paper")
    name = parser.parse_args(argv).name
    console = Console(highlight=False, markup=False)
    if name in COMPANIONS:
        _print_companion(console, COMPANIONS[name])
        return 0
    found = cards()
    if name is None:
        _print_list(console, found.methods.values())
        return 0
    try:
        card = found.methods.get(name) or make_card(name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    _print_card(console, card, found.rule)
    return 0


def _print_list(console: Console, methods: Iterable[Card]) -> None:
    table = Table(box=box.SIMPLE, leading=1)
    for column in ("method", "kind", "year", "arXiv", "what it is"):
        table.add_column(column, no_wrap=column != "what it is")
    for card in methods:
        stages = [f"no {stage}" if card.stages[stage] == "none" else stage for stage in card.differs]
        what = Text(card.summary)
        what.append(f"\nstages: {', '.join(stages) or 'the reference of this list'}", style="cyan")
        what.append(f"\n{', '.join(card.own)}", style="dim")
        table.add_row(card.name, card.kind, str(card.year), card.arxiv, what)
    for one in COMPANIONS.values():
        what = Text(one.summary)
        what.append(f"\n{one.use}", style="dim")
        table.add_row(one.name, one.kind, str(one.year), one.arxiv, what)
    console.print(table)
    console.print(
        "kind: policy methods learn from rollouts and rewards, supervised ones from demonstrations; any of"
    )
    console.print("them trains with an adapter or an optimiser; an agent has a loop of its own")
    console.print("stages: where it differs from GRPO, or SFT; below them, its own options at their defaults")
    console.print("hapo methods NAME: stages, all options and their meaning, paper")


def _print_card(console: Console, card: Card, temperature: Mapping[str, list[str]]) -> None:
    console.print(f"{card.name} ({card.kind}): {card.summary}", style="bold")
    _print_paper(console, card)
    for broken in card.breaks:
        console.print(f"breaks the {broken} law by its definition (docs/laws.md)")
    console.print(f"stages (* differs from {REFERENCE[card.kind].upper()})", style="italic")
    stages = Table(box=box.SIMPLE, show_header=False)
    for stage, choice in card.stages.items():
        stages.add_row(f"{stage} *" if stage in card.differs else stage, choice)
    console.print(stages)
    if card.options:
        _print_options(console, "options (method_options), its own first", card.options)
    if "temperature" in card.options:
        _print_options(console, "keys of the option temperature", temperature)


def _print_companion(console: Console, one: Companion) -> None:
    console.print(f"{one.name} ({one.kind}): {one.summary}", style="bold")
    _print_paper(console, one)
    console.print(f"{one.home}; {one.use}")
    _print_options(console, "options", one.options)


def _print_paper(console: Console, card: Card | Companion) -> None:
    console.print(f"{card.title} ({card.year})")
    console.print(f"https://arxiv.org/abs/{card.arxiv}")


def _print_options(console: Console, title: str, options: Mapping[str, list[str]]) -> None:
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for column in ("option", "default", "meaning"):
        table.add_column(column, no_wrap=column != "meaning")
    for option, (default, meaning) in options.items():
        table.add_row(option, default, meaning)
    console.print(table)
