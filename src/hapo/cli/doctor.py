"""`hapo doctor`: what is wrong with a recipe before training, a run after it, or the installed engines."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from ..assets import embedded
from ..insight.checks_engine import Installed, examine_engines, what_is_told, what_works
from ..insight.finding import Finding
from ..versions import PAGE
from . import UsageError

WARNINGS, ERRORS = 3, 4
COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def main(argv: list[str]) -> int:
    """Examine, print, and return the exit code: 0, or 3 if the worst finding is a warning, 4 if an error."""
    as_json, argv = "--json" in argv, [word for word in argv if word != "--json"]
    if "--engine" in argv:
        if argv != ["--engine"]:
            raise UsageError(
                "--engine looks at the installed packages: it takes no recipe, no run, no flag but --json"
            )
        return _engines(Installed.here(), as_json)
    target, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    if target is not None and target not in embedded() and Path(target).is_dir():
        if flags:
            raise UsageError(f"a run takes no flags but --json, got {flags[0]}")
        from ..insight.doctor import examine_run  # imports what reads data; the installed packages need none of it
        from ..insight.run import Run

        findings = examine_run(Run(target))
    else:
        from .plan import examine_recipe  # imports TRL, whose options are flags; a run needs none of it

        findings = examine_recipe(flags if target is None else ["--config", target, *flags])
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings, Console(highlight=False, markup=False))
    return _code(findings)


def _engines(installed: Installed, as_json: bool) -> int:
    """What is installed, what of it works together, and what does not."""
    works, told, findings = what_works(installed), what_is_told(installed), examine_engines(installed)
    if as_json:
        parts = {
            "installed": dict(installed.versions),
            "works": [answer._asdict() for answer in works],
            "told": [answer._asdict() for answer in told],
        }
        print(json.dumps({**parts, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        console = Console(highlight=False, markup=False)
        console.print("installed: " + ", ".join(f"{name} {found}" for name, found in installed.versions.items()))
        table = Table.grid(padding=(0, 1))
        for answer in works:
            table.add_row("yes" if answer.works else "no", answer.wanted, answer.because)
        console.print(Padding(table, (1, 0, 1, 2)))
        if told:
            of_draws = Table(box=None, padding=(0, 1), pad_edge=False, header_style="")
            for head in ("told of a draw by", "support, where truncated", "entropies"):
                of_draws.add_column(head)
            for of_engine in told:
                of_draws.add_row(*of_engine)
            console.print(Padding(of_draws, (0, 0, 1, 2)))
        _print(findings, console)
        console.print(f"Which engine, which release, which features: {PAGE}")
    return _code(findings)


def _code(findings: list[Finding]) -> int:
    found = {finding.severity for finding in findings}
    return ERRORS if "error" in found else WARNINGS if "warning" in found else 0


def _print(findings: list[Finding], console: Console) -> None:
    for finding in findings:
        console.print(f"{finding.severity}: {finding.name}", style=COLOURS[finding.severity])
        table = Table.grid(padding=(0, 1))
        for label in ("saw", "why", "change"):
            table.add_row(label, getattr(finding, label))
        console.print(Padding(table, (0, 0, 1, 2)))
    counts = Counter[str](finding.severity for finding in findings)
    parts = [f"{counts[kind]} {kind}{'s' * (counts[kind] > 1)}" for kind in COLOURS if counts[kind]]
    console.print(", ".join(parts) or "nothing found")
