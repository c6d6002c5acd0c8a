"""Finished runs, of any engine, named on the command line as ARM=FOLDER."""

from __future__ import annotations

from pathlib import Path

from ..insight.run import Run
from . import UsageError


def split_named(word: str) -> tuple[str, Path]:
    """Label and folder of `ARM=FOLDER`. Both may hold a `=`: the cut is the last that the folder of a run follows.

    Raises:
        UsageError: there is none.
    """
    for cut in reversed([at for at, character in enumerate(word) if character == "="]):
        label, folder = word[:cut], Path(word[cut + 1 :])
        if label and (folder / "config.yaml").is_file():
            return label, folder
    raise UsageError(
        f"{word!r} is no ARM=FOLDER with the folder of a run, which has a config.yaml: "
        "write --runs hapo=runs/a dapo=runs/b"
    )


def finished_runs(words: list[str]) -> dict[tuple[str, int], Path]:
    """The folders by arm and seed; the seed is the manifest's.

    Raises:
        UsageError: a run that is not finished or names no seed; two runs of one arm and seed.
    """
    found: dict[tuple[str, int], Path] = {}
    for label, folder in map(split_named, words):
        run = Run(folder)
        if run.finished is None:
            raise UsageError(f"{folder} has no finished.json: let the run come to its end, or leave it out")
        seed = run.manifest.get("seed")
        if not isinstance(seed, int):
            raise UsageError(f"{folder}: manifest.json has the seed {seed!r}; runs are paired by whole numbers")
        if (label, seed) in found:
            raise UsageError(
                f"{found[label, seed]} and {folder} are both seed {seed} of arm {label!r}: name one of them, or "
                "give them arms of their own"
            )
        found[label, seed] = folder
    return found
