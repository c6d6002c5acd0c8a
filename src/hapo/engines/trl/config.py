"""`HAPOConfig`: GRPOConfig with a method in place of a loss type."""

from __future__ import annotations

import copy
import json
import math
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from transformers import TrainingArguments
from trl import GRPOConfig

import hapo

from ...method import Method
from ...methods import policy
from . import optimizer
from .demonstrations import Weight, check_options
from .options import DECIDED_BY_METHOD, LOSS_TYPES, done_by

UPDATES_PER_ROLLOUT = 4
"""Optimiser steps on one rollout batch where the user sets none; the paper takes 16."""


@dataclass
class HAPOConfig(GRPOConfig):
    """`GRPOConfig` plus a method. All TRL options keep their meaning, except those that the method decides
    (`loss_type`, `epsilon`, `scale_rewards`, ...), which are refused when set.

    An option that a method decides may be set to what the method does (`epsilon=0.2` with dapo); anything else is
    refused, with what to set instead. Three defaults differ from TRL: without `steps_per_generation` or
    `generation_batch_size`, a rollout batch is used for four optimiser steps (with one, the policy never leaves
    the rollout policy: every ratio is 1); without `beta` the weight of the KL penalty is the method's own; and the
    penalty is multiplied by the ratio (`use_bias_correction_kl`) only where it is asked for.

    Raises:
        ValueError: unknown method or option, an option that the method decides, or a schedule in which an
            optimiser step would span two rollout batches.
    """

    _VALID_DICT_FIELDS: ClassVar = [
        *GRPOConfig._VALID_DICT_FIELDS, "method_options", "demonstration_method_options",
    ]  # fmt: skip
    trains_diffusion: ClassVar[bool] = False
    """Whether the trainer of this configuration has the views that a method's `likelihood` asks for."""

    steps_per_generation: int | None = field(
        default=None,
        metadata={"help": "Micro-batches of a rollout batch; default 4 x gradient_accumulation_steps."},
    )
    method: str = field(
        default="hapo", metadata={"help": "Policy-optimisation method; `hapo methods` lists them."}
    )
    method_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Options of the method, e.g. {"eps_high": 0.28}; `hapo methods NAME`.'}
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the method's KL penalty; above 0 a reference model is loaded. Default: the "
            "method's own (grpo 0.04, sent 0.1, archer and aspo 0.001, others 0)."
        },
    )
    max_num_gen_batches: int = field(
        default=1,
        metadata={
            "help": "Dynamic sampling: rounds of generation until every group of the rollout batch has unequal "
            "rewards; the paper's setting is 10. With 1, groups of equal rewards are dropped, not replaced."
        },
    )
    draw_ahead: bool = field(
        default=False,
        metadata={
            "help": "Dynamic sampling: the first round holds the further prompts that will be needed, judged by "
            "the share of groups with unequal rewards so far, so that one round is mostly enough; generation "
            "then holds up to twice the responses."
        },
    )
    stage_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the training data with each prompt's stage, a whole number: the stages come one "
            "after another, the smallest first (with a minus before the name the largest), shuffled inside, each "
            "for a share of the training in proportion to its prompts; none: no order, also with a curriculum."
        },
    )
    tokens_per_pass: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of one forward and backward pass, padding included, equal prompts once: larger "
            "micro-batches are taken in several, which changes memory and speed, not the gradient. Default: 2,048 "
            "on a CPU, 16,384 elsewhere; 0: the micro-batch as it is, as with FSDP, DeepSpeed and images."
        },
    )
    whole_groups: bool = field(
        default=False,
        metadata={
            "help": "Keep all answers to a prompt in one optimiser step, where TRL shuffles those of a rollout "
            "batch over its steps: a prompt is then run in one step alone, and the steps are others. verl's "
            "use_prefix_grouper keeps them together to the same end."
        },
    )
    score_rollouts: bool = field(
        default=True,
        metadata={
            "help": "False: take the old policy's log-probs and entropies as vLLM knew them at the draw, without "
            "a scoring pass; the ratio then holds the rounding between the two. For colocated vLLM."
        },
    )
    overlong_buffer: int = field(
        default=0,
        metadata={
            "help": "Soft overlong punishment: tokens before max_completion_length over which the reward "
            "falls by overlong_factor; 0 is off."
        },
    )
    overlong_factor: float = field(
        default=1.0, metadata={"help": "Largest length penalty, reached at max_completion_length."}
    )
    sampling_support: bool | None = field(
        default=None,
        metadata={
            "help": "Where top_k, top_p or min_p leave out tokens: log-probs of all policies over those that they "
            "left to each draw, so that ratios are exact. Default: where the engine tells them, else the method's "
            "importance weight as it is, with a warning; true: or an error; false: never."
        },
    )
    demonstration_weight: float | str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "mu of L = (1 - mu) L_RL + mu L_E, L_E the loss on demonstrations: a number in [0, 1), or a "
            'mapping of optimiser steps to such numbers, as {"0": 0.5, "200": 0.1}, linear between them. Default: '
            "0.1 where there are demonstrations."
        },
    )
    demonstration_method: str = field(
        default="sft", metadata={"help": "Supervised method of L_E; `hapo methods` lists them with their kind."}
    )
    demonstration_method_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of that method; `hapo methods NAME`."}
    )
    demonstrations_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Demonstrations of an optimiser step, on all ranks together. Default: one for each "
            "num_generations responses of the step."
        },
    )
    run_records: bool = field(
        default=False,
        metadata={"help": "Write config.yaml, manifest.json, metrics.jsonl and tokens/ into output_dir."},
    )
    record_tokens_every: int = field(
        default=10,
        metadata={"help": "Rollout batches between token records, besides the first; 0 writes none."},
    )
    record_tokens_rows: int = field(
        default=128, metadata={"help": "Responses of a token record, at most: whole groups, the first ones."}
    )
    optim: str = field(default=TrainingArguments.default_optim, metadata=optimizer.HELP)
    use_bias_correction_kl: bool = field(
        default=False,
        metadata={"help": "Multiply the KL penalty by the importance ratio, the method's option unbiased_kl."},
    )
    # None where nothing is asked for: what TRL's default would mean, the method decides.
    loss_type: str | None = field(default=None, metadata={"help": "Refused, unless it is the method's."})
    epsilon: float | None = field(default=None, metadata={"help": "Refused, unless it is the method's eps_low."})
    importance_sampling_level: str | None = field(
        default=None, metadata={"help": "Refused, unless it is the method's."}
    )
    scale_rewards: str | None = field(default=None, metadata={"help": "Refused, unless it is the method's."})
    top_entropy_quantile: float | None = field(
        default=None, metadata={"help": "Refused, unless it is the method's rho."}
    )
    vllm_importance_sampling_correction: bool | None = field(
        default=None, metadata={"help": "Refused, unless it is whether the method has a sampler_cap."}
    )
    vllm_importance_sampling_mode: str | None = field(
        default=None, metadata={"help": "Refused, unless it is token_truncate: the correction is per token."}
    )
    vllm_importance_sampling_clip_max: float | None = field(
        default=None, metadata={"help": "Refused, unless it is the method's sampler_cap."}
    )
    sapo_temperature_neg: float | None = field(default=None, metadata={"help": "Refused, unless it is sapo's."})
    sapo_temperature_pos: float | None = field(default=None, metadata={"help": "Refused, unless it is sapo's."})

    def __post_init__(self) -> None:
        """TRL's checks, then ours."""
        if self.steps_per_generation is None and self.generation_batch_size is None:
            self.steps_per_generation = UPDATES_PER_ROLLOUT * self.gradient_accumulation_steps
        filled = self.filled_in()
        with optimizer.checked(filled):
            GRPOConfig.__post_init__(filled)
        # A later TRL may have taken any of them away.
        unasked = {name for name in DECIDED_BY_METHOD if getattr(self, name, None) is None}
        self.__dict__.update({name: value for name, value in vars(filled).items() if name not in unasked})
        options = self.method_options or {}
        if not isinstance(options, dict):
            raise ValueError(f"method_options must be a mapping of option names to values, got {options!r}")
        if "kl_coef" in options:
            raise ValueError(
                "set the weight of the KL penalty with TRL's beta, not with method_options['kl_coef']"
            )
        if self.use_bias_correction_kl and options.get("unbiased_kl") is False:
            raise ValueError(
                "use_bias_correction_kl=True and method_options['unbiased_kl']=False disagree; set one"
            )
        self.refuse_what_the_method_decides(policy(self.method, **options))
        if self.demonstration_weight is not None:  # the command line gives text
            self.demonstration_weight = Weight(self.demonstration_weight).given
        check_options(self)
        self._check_schedule()
        least = {"max_num_gen_batches": 1, "overlong_buffer": 0, "record_tokens_every": 0, "record_tokens_rows": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.tokens_per_pass is not None and self.tokens_per_pass < 0:
            raise ValueError(f"tokens_per_pass must be at least 0, which is no limit, got {self.tokens_per_pass}")
        if self.overlong_buffer and getattr(self, "mask_truncated_completions", False):
            raise ValueError(
                f"overlong_buffer={self.overlong_buffer} punishes long responses, and "
                "mask_truncated_completions=True takes the longest of them out of the loss: choose one, "
                "overlong_buffer=0 or mask_truncated_completions=False"
            )
        if self.overlong_buffer > self.max_completion_length:
            raise ValueError(
                f"overlong_buffer ({self.overlong_buffer}) must not exceed max_completion_length "
                f"({self.max_completion_length})"
            )

    @property
    def updates_per_rollout(self) -> int:
        """Optimiser steps taken on one rollout batch."""
        return self.steps_per_generation * self.num_iterations // self.gradient_accumulation_steps

    @property
    def asked(self) -> dict[str, Any]:
        """What was asked for of the options that a method decides."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self) if f.name in DECIDED_BY_METHOD}
        return {name: value for name, (value, default) in values.items() if value != default}

    def filled_in(self) -> HAPOConfig:
        """A copy in which TRL finds its own defaults where nothing is asked for."""
        theirs = {f.name: f.default for f in fields(GRPOConfig)}
        # TRL's default masks whole sequences by their ratio, which would drop what a temperature rule samples.
        theirs["vllm_importance_sampling_mode"] = "token_truncate"
        filled = copy.copy(self)
        for f in fields(self):
            if f.name in DECIDED_BY_METHOD and getattr(self, f.name) is None:
                setattr(filled, f.name, theirs.get(f.name))
        return filled

    def refuse_what_the_method_decides(self, method: Method) -> None:
        """Raise a ValueError, unless all that was asked for is what the method does."""
        done = done_by(method)
        # The loss first: with another method the other options may be what it does.
        for name, value in sorted(self.asked.items(), key=lambda item: item[0] != "loss_type"):
            if name == "scale_rewards" and isinstance(value, bool):
                value = "group" if value else "none"
            if name not in done or value != done[name]:
                remedy = DECIDED_BY_METHOD[name]
                if name == "loss_type":
                    known = f'choose method="{value}"' if value in hapo.methods("policy") else remedy
                    remedy = LOSS_TYPES.get(str(value), known)
                remedy = remedy.replace("...", json.dumps(value, default=str))
                does = "" if done.get(name) is None else f", in {method.name} it is {done[name]!r}"
                raise ValueError(f"{name}={value!r} cannot be honoured: the method decides it{does}; {remedy}")

    def _check_schedule(self) -> None:
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation ({self.steps_per_generation}) must be a multiple of "
                f"gradient_accumulation_steps ({self.gradient_accumulation_steps}): an optimiser step that spans "
                "two rollout batches has no exact token count; set steps_per_generation="
                f"{math.ceil(self.steps_per_generation / self.gradient_accumulation_steps)} x "
                "gradient_accumulation_steps, for instance"
            )
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if self.whole_groups and rows % self.num_generations:
            raise ValueError(
                f"whole_groups=True, and the {rows} answers of an optimiser step on a device "
                f"(per_device_train_batch_size {self.per_device_train_batch_size} x gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}) are no whole groups of num_generations="
                f"{self.num_generations}: make them a multiple, or leave whole_groups out"
            )
        if self.updates_per_rollout == 1:
            warnings.warn(
                "One optimiser step a rollout batch: the policy is the rollout policy, every importance ratio is "
                "1, and nothing is ever clipped. Set steps_per_generation to a multiple (4 to 16 times) of "
                "gradient_accumulation_steps, or num_iterations > 1, for the method's bounds to act.",
                UserWarning,
                stacklevel=4,
            )
