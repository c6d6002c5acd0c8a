"""A recipe with flags, examined by the doctor before it is trained."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers import AutoConfig, AutoTokenizer

from ..insight.doctor import Finding, examine_config
from ..loops.options import ETPOConfig
from ..tasks import TaskConfig, load_task
from . import UsageError
from .model import AdaptedModelConfig
from .recipe import RecipeParser
from .run_folder import model_path, prepare_process
from .train import TrainOptions, config_of, embedded_for, method_of

DESCRIPTION = """hapo doctor RECIPE [flags]: what is wrong with a training run before it starts; takes a recipe and
flags as `hapo train` does, reads data, tokeniser and the model's config.json, and never its weights.
hapo doctor RUN: what went wrong in the run of this folder. Exit code: 0 nothing, or notes only; 3 warnings;
4 errors; 1 and 2 as in every command, where it could not be examined."""


def examine_recipe(argv: list[str]) -> list[Finding]:
    """What is wrong with the training run that these arguments of `hapo doctor` describe.

    Raises:
        UsageError: see `RecipeParser.read`; no model is named; the method is an agent's.
    """
    if method_of(argv) == ETPOConfig.method:
        raise UsageError("the doctor looks at runs of etpo, not at their recipes: train, then hapo doctor RUN")
    kinds: list[type] = [TaskConfig, config_of(argv), AdaptedModelConfig, TrainOptions]
    parser = RecipeParser("hapo doctor", DESCRIPTION, kinds, embedded_for(kinds[1]))
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One optimiser step a rollout batch")  # a finding says it
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)  # TRL's own
        task_config, args, model_config, options, _ = parser.read([*argv, *_elsewhere()])
    path = model_path(model_config)
    prepare_process(options.threads)
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


def _elsewhere() -> list[str]:
    """Flags that let a recipe for GPUs be read on a machine without one: transformers asks the machine."""
    return [] if torch.cuda.is_available() else ["--use_cpu", "true", "--tf32", "false"]


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
