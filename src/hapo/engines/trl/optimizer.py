"""The optimisers of `hapo.optim` by name, in the place of transformers' `optim`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ...methods._options import check_names, nearest
from ...optim import Optimistic, OptimisticAdagrad, OptimisticSGD

OPTIMIZERS: dict[str, type[Optimistic]] = {"oadagrad": OptimisticAdagrad, "osg": OptimisticSGD}

TAKEN: dict[str, dict[str, type]] = {
    "oadagrad": {"delta": float, "lag": int, "include_g0": bool, "foreach": bool},
    "osg": {"foreach": bool},
}
"""Name -> what `optim_args` may say, with its type."""

ELSEWHERE = {"lr": "learning_rate", "weight_decay": "weight_decay"}
"""Options of the optimisers that are options of the config."""

OF_OTHERS = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules")
"""Options of TRL's that no optimiser of ours has."""

HELP = {"help": "Optimizer: oadagrad or osg (hapo.optim), or one of transformers' OptimizerNames."}
"""Of the field `optim`, which is a string: as an enum the command line would know transformers' names alone."""


@contextmanager
def checked(config: TrainingArguments) -> Iterator[None]:
    """Around transformers' own checks of a config, which know its own optimisers alone: hide a name of ours.

    Raises:
        ValueError: no such optimiser, or an option that it does not take.
    """
    name = str(getattr(config.optim, "value", config.optim))
    theirs = [one.value for one in OptimizerNames]
    if name not in OPTIMIZERS:
        if name not in theirs:
            raise ValueError(f"there is no optimizer {name!r}; {nearest(name, [*OPTIMIZERS, *theirs])}")
        yield
        return
    for option in OF_OTHERS:
        if getattr(config, option) != TrainingArguments.__dataclass_fields__[option].default:
            raise ValueError(
                f"{option}={getattr(config, option)!r} cannot be honoured: optim={name!r} has no such option; "
                "leave it out"
            )
    cls, options = named(config)
    cls([{"params": [torch.zeros(1)], "weight_decay": config.weight_decay}], **options)  # its own checks
    config.optim = TrainingArguments.default_optim
    try:
        yield
    finally:
        config.optim = name


def named(config: TrainingArguments) -> tuple[type[Optimistic], dict[str, Any]]:
    """Class and options of the optimiser of ours that a config names.

    Raises:
        ValueError: `optim_args` names an option that it does not take, or has a value of another type.
    """
    name = str(config.optim)
    options: dict[str, Any] = {"lr": config.learning_rate}
    for pair in (config.optim_args or "").replace(" ", "").split(",") if config.optim_args else ():
        option, _, text = pair.partition("=")
        if option in ELSEWHERE:
            raise ValueError(f"optim_args={config.optim_args!r}: set {option} by the option {ELSEWHERE[option]}")
        check_names(f"optim {name!r}", [option], list(TAKEN[name]))
        options[option] = _value(option, text, TAKEN[name][option])
    return OPTIMIZERS[name], options


def _value(option: str, text: str, kind: type) -> Any:
    words = {"true": True, "false": False}
    try:
        return words[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        like = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"optim_args: {option} must be {like}, got {text!r}; as in {option}=VALUE,...") from None


class NamedOptimizer:
    """A part of a trainer of transformers that knows the names of our optimisers."""

    @classmethod
    def get_optimizer_cls_and_kwargs(
        cls, args: TrainingArguments, model: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        """transformers' class and options of what `args.optim` names, or ours."""
        if args.optim in OPTIMIZERS:
            return named(args)
        return super().get_optimizer_cls_and_kwargs(args, model)  # type: ignore[misc]
