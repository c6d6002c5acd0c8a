"""`hapo convert`: the token dumps of another trainer as a run folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from ..assets import tiny_model_path
from ..insight.finding import counted
from ..tasks.reward_options import unread
from . import UsageError

DESCRIPTION = """Write a run folder from the token exports of prime-rl, or the rollout dumps of slime and miles,
for `hapo report`: curves, token figures, the token microscope. Name the method to show at work on the tokens."""


def main(argv: list[str]) -> int:
    """Convert, print, and return the exit code."""
    options = _parser().parse_args(argv)
    if not options.source.is_dir():
        raise UsageError(f"{options.source} is no folder")
    from transformers import AutoTokenizer

    from ..insight.foreign import convert

    name = options.tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(tiny_model_path()) if name == "tiny" else name)
    except (OSError, ValueError) as error:  # ValueError: a folder without a tokenizer
        raise UsageError(
            f"--tokenizer {name!r} {unread(name, error)}: name a folder with a tokenizer, one on the Hub that "
            "this machine can reach, or tiny"
        ) from error
    steps = convert(options.source, options.output_dir, tokenizer.batch_decode, options.method)
    console = Console(highlight=False, markup=False)
    console.print(f"{counted(steps, 'step')}: {options.output_dir}", soft_wrap=True)
    console.print(f"next: hapo report {options.output_dir}", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    from ..insight.foreign import METHOD

    parser = argparse.ArgumentParser(prog="hapo convert", description=DESCRIPTION)
    add = parser.add_argument
    add("source", type=Path, metavar="FOLDER", help="prime-rl's output folder, or the folder of the .pt dumps")
    add("--tokenizer", required=True, help="of the model: a folder, or an id of the Hub")
    add("--output_dir", type=Path, required=True, help="the run folder to write")
    add("--method", default=METHOD, help="NAME or NAME:option=value,... (%(default)s)")
    return parser
