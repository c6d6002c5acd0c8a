"""`HAPOConfig`: GRPOConfig with a method in place of a loss type."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from trl import GRPOConfig

import hapo

from ...method import Method
from ...methods import options_of
from .vllm import check_rule

UPDATES_PER_ROLLOUT = 4
"""Optimiser steps on one rollout batch where the user sets none; the paper takes 16."""

DECIDED_BY_METHOD = {
    "loss_type": "choose method=",
    "epsilon": 'set method_options={"eps_low": ...}',
    "epsilon_high": 'set method_options={"eps_high": ...}',
    "delta": 'set method_options={"dual_clip": ...}',
    "importance_sampling_level": "choose method=",
    "scale_rewards": "choose method=",
    "multi_objective_aggregation": "rewards are summed with reward_weights before the method sees them",
    "top_entropy_quantile": "choose a method that selects tokens",
    "off_policy_mask_threshold": "no method uses it",
    "entropy_coef": "no method has an entropy term in its loss",
    "use_adaptive_entropy": "no method has an entropy term in its loss",
    "sapo_temperature_neg": 'set method_options={"tau_neg": ...} of sapo',
    "sapo_temperature_pos": 'set method_options={"tau_pos": ...} of sapo',
    "vespo_k_pos": "no method has them",
    "vespo_k_neg": "no method has them",
    "vespo_lambda_pos": "no method has them",
    "vespo_lambda_neg": "no method has them",
    "entropy_coef_min": "no method has an entropy term in its loss",
    "entropy_coef_max": "no method has an entropy term in its loss",
    "entropy_coef_delta": "no method has an entropy term in its loss",
    "entropy_target": "no method has an entropy term in its loss",
    "vllm_importance_sampling_cap": "set method_options={'sampler_cap': ...}",
    "use_bias_correction_kl": "the penalty is GRPO's k3",
    "vllm_importance_sampling_mode": "the correction is per token, truncated at method_options['sampler_cap']",
    "vllm_importance_sampling_correction": "set method_options={'sampler_cap': null} for none",
    "vllm_importance_sampling_clip_max": "set method_options={'sampler_cap': ...}",
    "vllm_importance_sampling_clip_min": "the correction has no lower bound",
    "use_liger_kernel": "log-probs come from hapo.scoring",
    "cast_lm_head_to_fp32": "hapo.scoring sums in float32 whatever the dtype of the weights",
}
"""TRL options that a method decides, and what to do instead."""


@dataclass
class HAPOConfig(GRPOConfig):
    """`GRPOConfig` plus a method. All TRL options keep their meaning, except those that the method decides
    (`loss_type`, `epsilon`, `scale_rewards`, ...), which are refused when set.

    Two defaults differ from TRL: without `steps_per_generation` or `generation_batch_size`, a rollout batch is
    used for four optimiser steps (with one, the policy never leaves the rollout policy: every ratio is 1); and
    without `beta` the weight of the KL penalty is the method's own.

    Raises:
        ValueError: unknown method or option, an option that the method decides, or a schedule in which an
            optimiser step would span two rollout batches.
    """

    _VALID_DICT_FIELDS: ClassVar = [*GRPOConfig._VALID_DICT_FIELDS, "method_options"]

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
            "method's own (grpo 0.04, archer and aspo 0.001, others 0)."
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
    tokens_per_pass: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of one forward and backward pass, padding included, equal prompts once: larger "
            "micro-batches are taken in several, which changes memory and speed, not the gradient. Default: 2,048 "
            "on a CPU, 16,384 elsewhere; 0: the micro-batch as it is, as with FSDP, DeepSpeed and images."
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
    # TRL's default masks whole sequences by their ratio, which would drop what adaptive temperature samples.
    vllm_importance_sampling_mode: str = field(
        default="token_truncate",
        metadata={"help": "Kept for TRL; the correction is the method's own, per token."},
    )

    def __post_init__(self) -> None:
        """TRL's checks, then ours."""
        if self.steps_per_generation is None and self.generation_batch_size is None:
            self.steps_per_generation = UPDATES_PER_ROLLOUT * self.gradient_accumulation_steps
        super().__post_init__()
        options = self.method_options or {}
        if not isinstance(options, dict):
            raise ValueError(f"method_options must be a mapping of option names to values, got {options!r}")
        if "kl_coef" in options:
            raise ValueError(
                "set the weight of the KL penalty with TRL's beta, not with method_options['kl_coef']"
            )
        hapo.method(self.method, **options)
        self._refuse_what_the_method_decides()
        self._check_schedule()
        least = {"max_num_gen_batches": 1, "overlong_buffer": 0, "record_tokens_every": 0, "record_tokens_rows": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.tokens_per_pass is not None and self.tokens_per_pass < 0:
            raise ValueError(f"tokens_per_pass must be at least 0, which is no limit, got {self.tokens_per_pass}")
        if self.overlong_buffer and self.mask_truncated_completions:
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

    def _refuse_what_the_method_decides(self) -> None:
        defaults = {f.name: f.default for f in fields(type(self))}
        for name, remedy in DECIDED_BY_METHOD.items():
            value = getattr(self, name)
            # TRL's own post-init fills epsilon_high and normalises scale_rewards to what the default means.
            if value != defaults[name]:
                raise ValueError(f"{name}={value!r} cannot be honoured: the method decides it; {remedy}")

    def _check_schedule(self) -> None:
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation ({self.steps_per_generation}) must be a multiple of "
                f"gradient_accumulation_steps ({self.gradient_accumulation_steps}): an optimiser step that spans "
                "two rollout batches has no exact token count"
            )
        if self.updates_per_rollout == 1:
            warnings.warn(
                "One optimiser step a rollout batch: the policy is the rollout policy, every importance ratio is "
                "1, and nothing is ever clipped. Set steps_per_generation to a multiple (4 to 16 times) of "
                "gradient_accumulation_steps, or num_iterations > 1, for the method's bounds to act.",
                UserWarning,
                stacklevel=4,
            )


def resolve_method(method: Method | None, args: HAPOConfig) -> Method:
    """The method that a trainer was given, or that its config names; `args.beta` then holds its KL weight."""
    if method is not None:
        if not isinstance(method, Method):
            raise TypeError(f"method must be a Method, got {method!r}; a name goes into HAPOConfig(method=...)")
        weight = _kl_weight(method)
        if args.beta is not None and args.beta != weight:
            raise ValueError(f"beta={args.beta} and the method's kl_coef={weight} disagree; set one of them")
        args.beta = weight  # TRL loads a reference model where this is not 0
        return method
    if args.beta is None:
        args.beta = options_of(args.method).kl_coef
    options = {**(args.method_options or {}), "kl_coef": args.beta}  # type: ignore[dict-item]
    named = hapo.method(args.method, **options)
    if named.penalty is not None and not args.beta:
        raise ValueError(
            f"method {named.name!r} has a KL penalty, and TRL loads a reference model only with beta > 0: "
            "set it, or switch the penalty off"
        )
    return named


def _kl_weight(method: Method) -> float:
    """What TRL's beta is to be: above 0 where the method reads a reference policy."""
    options = getattr(method.penalty, "options", {})  # of a Stage
    if isinstance(options.get("coef"), float):
        return options["coef"]
    if "penalty" in method.options.get("replaced", ()):
        return 0.0 if method.penalty is None else 1.0
    return method.options.get("kl_coef") or (0.0 if method.penalty is None else 1.0)


NO_TEMPERATURE = (
    'switch that off: method_options={"components": "BCD"} for hapo, no "temperature" for other methods'
)


def check_arguments(method: Method, args: HAPOConfig, model: Any, others: dict[str, Any]) -> None:
    """Refuse what a `HAPOTrainer` cannot honour; `others` are the trainer's further keyword arguments.

    Raises:
        ValueError: which argument, why, and what to set.
    """
    generation = args.generation_kwargs or {}
    if args.use_vllm:
        check_rule(method)
    if others.get("rollout_func") is not None and method.temperature_rule is not None:
        raise ValueError(
            f"method {method.name!r} adapts the sampling temperature, and a rollout_func samples by itself: "
            f"let the trainer generate, or {NO_TEMPERATURE}"
        )
    peft = others.get("peft_config") is not None or hasattr(model, "peft_config")
    if args.beta and not (isinstance(model, str) or model.config._name_or_path or peft):
        raise ValueError(
            f"beta={args.beta} needs a reference model, which TRL loads by the model's path, and this one has "
            "none: save it and hand over the folder, or set beta=0"
        )
    if method.temperature_rule is not None and "temperature" in generation:
        raise ValueError("generation_kwargs: set the base temperature with temperature=, which scoring reads too")
    if generation.get("num_beams", 1) != 1:
        raise ValueError("generation_kwargs: num_beams must be 1, policies are sampled, not searched")
