"""`AsyncHAPOConfig`: TRL's AsyncGRPOConfig with a method in place of its one loss."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments
from trl.experimental.async_grpo import AsyncGRPOConfig

from ....method import Method
from ....methods import policy
from ....samplers.rule import temperature_of
from .. import optimizer
from ..arguments import check_likelihood, kl_weight
from ..options import DECIDED_BY_METHOD, NO_TEMPERATURE, done_by

OLD_POLICIES = ("sampler", "current")


@dataclass
class AsyncHAPOConfig(AsyncGRPOConfig):
    """`AsyncGRPOConfig` plus a method. TRL's options keep their meaning, except `epsilon` and `epsilon_high`,
    which the method decides, and `token_budget`, which bounds a pass and not a micro-batch.

    An optimiser step has per_device_train_batch_size x gradient_accumulation_steps x processes answers, whole
    groups of `num_generations`, whatever `token_budget` is.

    Raises:
        ValueError: unknown method or option, or an option that the method or the trainer cannot honour.
    """

    _VALID_DICT_FIELDS: ClassVar = [*AsyncGRPOConfig._VALID_DICT_FIELDS, "method_options"]

    method: str = field(
        default="hapo", metadata={"help": "Policy-optimisation method; `hapo methods` lists them."}
    )
    method_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Options of the method, e.g. {"eps_high": 0.28}; `hapo methods NAME`.'}
    )
    old_policy: str | None = field(
        default=None,
        metadata={
            "help": "What ratios are taken against. sampler: the log-probs that vLLM drew with, as in TRL, so "
            "that ratio and clip bounds measure staleness. current: the policy at the beginning of the step, "
            "scored once more, with the truncated weight of the method's sampler_cap for what separates it from "
            "the sampler; every ratio is then 1. Default: sampler, but current where the method adapts the "
            "temperature."
        },
    )
    run_records: bool = field(
        default=False,
        metadata={"help": "Write config.yaml, manifest.json, metrics.jsonl and tokens/ into output_dir."},
    )
    record_tokens_every: int = field(
        default=10, metadata={"help": "Optimiser steps between token records, besides the first; 0 writes none."}
    )
    record_tokens_rows: int = field(
        default=128, metadata={"help": "Responses of a token record, at most: whole groups, the first ones."}
    )
    token_budget: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of one forward and backward pass, shared prefixes once: micro-batches are taken "
            "in several passes, which changes memory and speed, not the gradient. Default: 2,048 on a CPU, 16,384 "
            "elsewhere; 0 or less: the micro-batch as it is. A response alone may exceed it; none is dropped."
        },
    )
    optim: str = field(default=TrainingArguments.default_optim, metadata=optimizer.HELP)
    epsilon: float | None = field(default=None, metadata={"help": "Refused, unless it is the method's eps_low."})

    def __post_init__(self) -> None:
        """TRL's checks, then ours."""
        with optimizer.checked(self):
            super().__post_init__()
        options = self.method_options or {}
        if not isinstance(options, dict):
            raise ValueError(f"method_options must be a mapping of option names to values, got {options!r}")
        self.check_method(policy(self.method, **{**options, "kl_coef": options.get("kl_coef", 0.0)}))
        if self.old_policy not in (None, *OLD_POLICIES):
            raise ValueError(f"old_policy must be one of {', '.join(OLD_POLICIES)}, got {self.old_policy!r}")
        if self.old_policy == "sampler" and options.get("sampler_cap") is not None:
            raise ValueError(
                f"method_options['sampler_cap']={options['sampler_cap']} weights the current policy against the "
                'sampler, and with old_policy="sampler" the ratio itself is against the sampler: leave it out, or '
                'set old_policy="current"'
            )
        for name, low in {"record_tokens_every": 0, "record_tokens_rows": 1}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}: it must be above 0, or all answers of a group are equal"
            )

    def check_method(self, method: Method) -> None:
        """Raise a ValueError unless this trainer can do what the method needs, and the method what is asked."""
        check_likelihood(method, diffusion=False)
        if weight := kl_weight(method):
            raise ValueError(
                f"method {method.name!r} has a KL penalty of weight {weight:g}, and TRL's asynchronous trainer "
                'loads no reference model: set method_options={"kl_coef": 0}, or train with HAPOTrainer'
            )
        if method.credit is not None:
            raise ValueError(
                f"method {method.name!r} reads a reward of each token, and TRL's rollout worker adds the rewards "
                "of an answer up to one number: leave the option advantage at its default, or train with "
                "HAPOTrainer"
            )
        if method.temperature_rule is not None:
            if temperature_of(method) is None:
                raise ValueError(
                    f"method {method.name!r} adapts the sampling temperature by a function of its own, and "
                    f"requests to vLLM carry numbers only: build it with temperature={{...}}, or {NO_TEMPERATURE}"
                )
            if self.old_policy == "sampler":
                raise ValueError(
                    f"method {method.name!r} draws at an adapted temperature, so that the sampler is not the old "
                    f'policy: set old_policy="current", or {NO_TEMPERATURE}'
                )
        done = done_by(method)
        for name in ("epsilon", "epsilon_high"):
            value = getattr(self, name)
            if value is not None and value != done.get(name):
                remedy = DECIDED_BY_METHOD[name].replace("...", json.dumps(value))
                does = "" if done.get(name) is None else f", in {method.name} it is {done[name]!r}"
                raise ValueError(f"{name}={value!r} cannot be honoured: the method decides it{does}; {remedy}")

    def groups_per_step(self, processes: int) -> int:
        """Whole groups of an optimiser step.

        Raises:
            ValueError: the answers of a step are no whole groups.
        """
        answers = self.per_device_train_batch_size * self.gradient_accumulation_steps * processes
        if answers % self.num_generations:
            raise ValueError(
                f"an optimiser step has {answers} answers (per_device_train_batch_size x "
                f"gradient_accumulation_steps x processes), which are no whole groups of "
                f"num_generations={self.num_generations}: a method compares the answers of a group, so set one to "
                "a multiple of the other"
            )
        return answers // self.num_generations


def resolve_method(method: Method | None, args: AsyncHAPOConfig) -> Method:
    """The method that a trainer was given, or that its config names; `args.old_policy` is filled in.

    Raises:
        ValueError: the trainer cannot do what the method needs.
    """
    if method is None:
        options = dict(args.method_options or {})  # type: ignore[arg-type]
        method = policy(args.method, **{"kl_coef": 0.0, **options})
    elif not isinstance(method, Method):
        raise TypeError(f"method must be a Method, got {method!r}; a name goes into AsyncHAPOConfig(method=...)")
    args.check_method(method)
    if args.old_policy is None:
        args.old_policy = "sampler" if method.temperature_rule is None else "current"
    return method


def check_arguments(method: Method, args: AsyncHAPOConfig, given: dict[str, Any]) -> None:
    """Refuse arguments of an `AsyncHAPOTrainer` that it cannot honour, before a model is loaded.

    Raises:
        ValueError: which argument, why, and what to do.
    """
    args.groups_per_step(args.world_size)
    if given.get("environment_factory") is not None:
        raise ValueError(
            "environment_factory: episodes of environments were not run with the asynchronous trainer: play them "
            "with hapo.trl.EnvironmentRollout in HAPOTrainer, or give the model tools"
        )
    if given.get("rollout_worker") is not None and method.temperature_rule is not None:
        raise ValueError(
            f"method {method.name!r} adapts the sampling temperature, and a rollout_worker of your own samples by "
            f"itself: leave it out, or {NO_TEMPERATURE}"
        )
    adapter = given.get("peft_config")
    kind = getattr(getattr(adapter, "peft_type", None), "value", getattr(adapter, "peft_type", None))
    if kind == "GATERA":
        raise ValueError(
            "vLLM takes merged weights or LoRA, and a GateRA adapter is neither: its gate makes the weight depend "
            "on the token. Take LoRA, or HAPOTrainer without vLLM"
        )
    if getattr(adapter, "is_prompt_learning", False):
        raise ValueError(f"{kind} is prompt-learning, which cannot be merged for vLLM: take LoRA")
