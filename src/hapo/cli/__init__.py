"""The command line: `hapo train`, `sft`, `eval`, `report`, `compare`, `doctor`, `curriculum`, `shape`,
and the others of `COMMANDS`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

import hapo

from ..outputs import check_free

COMMANDS = {
    "train": ("train", "train a model with verifiable rewards; alone, the embedded demo"),
    "sft": ("sft", "train a model on demonstrations; alone, an embedded example"),
    "eval": ("evaluate", "accuracy of a model on held-out problems or on named sets, with intervals"),
    "report": ("report", "one HTML page of a run, or of several: curves, token analyses, the token microscope"),
    "compare": ("compare", "methods against each other: paired seeds, intervals, a verdict in words"),
    "convert": ("convert", "the token dumps of another trainer, as a run that `hapo report` opens"),
    "doctor": ("doctor", "what is wrong with a recipe, a run, or the installed engines"),
    "curriculum": ("curriculum", "training problems in stages, by how much a model's answers to them differ"),
    "shape": ("shape", "the weights of a reward per token, mixed from attributions of a reward model's score"),
    "calibrate": ("calibrate", "write a temperature rule for decoding, from a model's answers to prompts"),
    "methods": ("methods", "list the methods; with a name, its stages, options and paper"),
}
"""Command -> (module of this package, one line of help)."""

INTERRUPTED = 130


class UsageError(ValueError):
    """The command line, or the recipe that it names, cannot be honoured."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done; 1: failed while running; 2: wrong flags or recipe, or a file is in the way; 3, 4: `hapo doctor` found
    warnings, errors; 130: interrupted. Errors are one message on stderr; with HAPO_DEBUG=1 they are raised.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        print(f"hapo {hapo.__version__}")
        return 0
    try:
        return _run(argv[0], argv[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("HAPO_DEBUG") == "1":
            raise
        wrong = isinstance(error, UsageError | FileExistsError)
        remedy = "" if wrong else "\n(HAPO_DEBUG=1 shows where it was raised)"
        print(f"hapo {argv[0]}: error: {error}{remedy}", file=sys.stderr)
        return 2 if wrong else 1


def check_output(*files: Path, inputs: Iterable[Path] = (), replace: bool) -> None:
    """Find out before any work whether the files that a user named can be written: `hapo.outputs.check_free`.

    Raises:
        UsageError: one is there already, is an input, or cannot be written.
    """
    try:
        check_free(*files, inputs=inputs, replace=replace)
    except OSError as error:
        raise UsageError(str(error)) from error


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint to append to a message: the known name nearest to the word, if any is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _run(command: str, argv: list[str]) -> int:
    if command not in COMMANDS:
        raise UsageError(f"there is no command {command!r}{nearest(command, COMMANDS)}; `hapo --help` lists them")
    try:
        return importlib.import_module(f".{COMMANDS[command][0]}", __name__).main(argv)
    except ModuleNotFoundError as error:
        *_, (last, _) = traceback.walk_tb(error.__traceback__)
        if last.f_globals["__name__"].partition(".")[0] != __package__.partition(".")[0]:
            raise  # a module that a reward of the user's lacks
        raise ImportError(f"{error}; install what it needs with: pip install 'hapo[trl]'") from error


def _help() -> str:
    lines = [f"  {name:<11} {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hapo COMMAND [options]   (hapo COMMAND --help; hapo --version)",
            "",
            "Token-level policy optimisation of language models.",
            "",
            *lines,
        ]
    )
