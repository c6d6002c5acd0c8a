"""`hapo doctor`: what is wrong with a recipe before training, or with a run after it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from ..assets import embedded
from ..insight.doctor import Finding, examine_run
from ..insight.run import Run
from . import UsageError

WARNINGS, ERRORS = 3, 4
COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def main(argv: list[str]) -> int:
    """Examine, print, and return the exit code: 0, or 3 if the worst finding is a warning, 4 if an error."""
    as_json, argv = "--json" in argv, [word for word in argv if word != "--json"]
    target, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    if target is not None and target not in embedded() and Path(target).is_dir():
        if flags:
            raise UsageError(f"a run takes no flags but --json, got {flags[0]}")
        findings = examine_run(Run(target))
    else:
        from .plan import examine_recipe  # imports TRL, whose options are flags; a run needs none of it

        findings = examine_recipe(flags if target is None else ["--config", target, *flags])
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings, Console(highlight=False, markup=False))
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
