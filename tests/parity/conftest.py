"""Collects the largest differences that the tests measure, and prints them as the tables of the page."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable

import pytest
import torch

torch.set_num_threads(1)

ROWS = pytest.StashKey[list[str]]()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, str, list[float]], None]:
    """Adds a row to the table: theirs, ours, largest differences (loss and gradient, or one number)."""

    def add(theirs: str, ours: str, found: list[float]) -> None:
        numbers = [f"{x:.0e}" if x else "0" for x in found]
        half = len(numbers) // 2
        columns = [theirs, ours, ", ".join(numbers[:half]), ", ".join(numbers[half:])]
        request.config.stash.setdefault(ROWS, []).append("| " + " | ".join(columns) + " |")

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the tables of docs/evidence/parity.md."""
    for row in config.stash.get(ROWS, []):
        terminalreporter.write_line(row)
