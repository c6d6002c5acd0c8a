"""`hapo doctor`: what is wrong with a recipe before training, or with a run after it."""

from __future__ import annotations

import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer
from trl import ModelConfig

from ..insight.doctor import Finding, examine_config, examine_run
from ..insight.run import Run
from ..tasks import TaskConfig, load_task
from ..trl import HAPOConfig
from . import UsageError
from .recipe import RecipeParser, embedded
from .train import TrainOptions, model_path, prepare_process

DESCRIPTION = """hapo doctor RECIPE [flags]: what is wrong with a training run before it starts; takes a recipe and
flags as `hapo train` does, reads data, tokeniser and the model's config.json, and never its weights.
hapo doctor RUN: what went wrong in the run of this folder. Exit code: 0 nothing, or notes only; 3 warnings;
4 errors; 1 and 2 as in every command, where it could not be examined."""

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
        findings = _examine_recipe(flags if target is None else ["--config", target, *flags])
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings, Console(highlight=False, markup=False))
    found = {finding.severity for finding in findings}
    return ERRORS if "error" in found else WARNINGS if "warning" in found else 0


def _examine_recipe(argv: list[str]) -> list[Finding]:
    kinds = [TaskConfig, HAPOConfig, ModelConfig, TrainOptions]
    parser = RecipeParser("hapo doctor", DESCRIPTION, kinds)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One optimiser step a rollout batch")  # a finding says it
        task_config, args, model_config, options, _ = parser.read(argv)
    path = model_path(model_config)
    prepare_process(options)
    revision = {"revision": model_config.model_revision, "trust_remote_code": args.trust_remote_code}
    sizes = {k: v for k, v in (args.model_init_kwargs or {}).items() if k == "max_position_embeddings"}
    with _quiet():
        task = load_task(replace(task_config, on_bad_gold="drop"), seed=args.seed)
    return examine_config(
        task_config,
        args,
        model_config,
        task=task,
        tokenizer=AutoTokenizer.from_pretrained(path, **revision),
        architecture=AutoConfig.from_pretrained(path, **revision, **sizes),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of loading data, which the findings say better."""
    logger = logging.getLogger("hapo.tasks.data")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


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
