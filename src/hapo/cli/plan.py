"""A recipe with flags, examined by the doctor before it is trained."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import torch
from transformers import AutoConfig, AutoTokenizer

import hapo

from ..insight.doctor import DemonstrationPlan, Finding, examine_config, examine_demonstrations
from ..loops.options import ETPOConfig
from ..tasks import TaskConfig, load_task
from ..tasks.demonstration_sets import DemonstrationConfig, load_demonstrations
from ..trl import HAPOConfig, SupervisedConfig
from . import UsageError
from .model import AdaptedModelConfig
from .recipe import RecipeParser, read_recipe, without
from .run_folder import model_path, prepare_process
from .sft import SftOptions
from .train import TrainOptions, config_of, embedded_for, method_of

DESCRIPTION = """hapo doctor RECIPE [flags]: what is wrong with a training run before it starts; takes a recipe and
flags as `hapo train` or `hapo sft` does, reads data, tokeniser and the model's config.json, and never its weights.
hapo doctor RUN: what went wrong in the run of this folder. Exit code: 0 nothing, or notes only; 3 warnings;
4 errors; 1 and 2 as in every command, where it could not be examined."""


def examine_recipe(argv: list[str]) -> list[Finding]:
    """What is wrong with the training run that these arguments of `hapo doctor` describe.

    Raises:
        UsageError: see `RecipeParser.read`; no model is named; the method is an agent's.
    """
    if method_of(argv) == ETPOConfig.method:
        raise UsageError("the doctor looks at runs of etpo, not at their recipes: train, then hapo doctor RUN")
    if learns_from_demonstrations(argv):
        return _examine_sft(argv)
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


def learns_from_demonstrations(argv: list[str]) -> bool:
    """Whether these are arguments of `hapo sft`: a supervised method, or an option that it alone has."""
    method = method_of(argv)
    if method in hapo.methods("supervised"):
        return True
    given, _ = without(argv, ())
    named = {} if given is None else read_recipe(given)
    if "method" in named or any(word.partition("=")[0] == "--method" for word in argv):
        return False
    words = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")} | set(named)
    own, others = (
        {f.name for kind in kinds for f in fields(kind)}
        for kinds in ((DemonstrationConfig, SupervisedConfig, SftOptions), (TaskConfig, HAPOConfig, TrainOptions))
    )
    return bool(words & (own - others))


def _examine_sft(argv: list[str]) -> list[Finding]:
    kinds = [DemonstrationConfig, SupervisedConfig, AdaptedModelConfig, SftOptions]
    parser = RecipeParser("hapo doctor", DESCRIPTION, kinds, default="sft")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)  # TRL's own
        config, args, model_config, options, _ = parser.read([*argv, *_elsewhere()])
    path = model_path(model_config)
    prepare_process(options.threads)
    revision = {"revision": model_config.model_revision, "trust_remote_code": args.trust_remote_code}
    sizes = {k: v for k, v in (args.model_init_kwargs or {}).items() if k == "max_position_embeddings"}
    with _quiet():
        data = load_demonstrations(config, seed=args.seed)
    return examine_demonstrations(
        DemonstrationPlan(
            config=config,
            args=args,
            model_config=model_config,
            evaluate=options.evaluate,
            answer_limit=options.max_completion_length,
            data=data,
            tokenizer=AutoTokenizer.from_pretrained(path, **revision),
            architecture=AutoConfig.from_pretrained(path, **revision, **sizes),
        )
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
