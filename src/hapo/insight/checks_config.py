"""What can be known to be wrong with the options of a training run. Thresholds: docs/doctor_findings.md."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..versions import SERVER_FLAGS
from .finding import Finding, percent

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase
    from trl import ModelConfig

    from ..engines.trl import HAPOConfig
    from ..method import Method
    from ..methods import Options, TemperatureOptions
    from ..tasks import Task, TaskConfig

ROWS = 512
"""Most problems that are tokenised, evenly spaced over the training data."""

TRUNCATIONS = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
"""Sampling options -> the value at which they leave the policy as it is."""

MISSING_MASS = (
    "the sampler's log-probs are over the tokens that are left, those of the policy over all: their ratio has the "
    "mean of what is left, not 1, another one at each token, and the gradient is off by as much"
)

CLAMPS = {"zscore": ("t_min", "t_max")}
"""Temperature rule -> the options that clamp it."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training run before it starts."""

    task_config: TaskConfig
    args: HAPOConfig
    model_config: ModelConfig
    task: Task | None
    tokenizer: PreTrainedTokenizerBase | None
    architecture: PreTrainedConfig | None

    @cached_property
    def options(self) -> Options:
        """The options of the method."""
        from ..methods import options_of

        assert not isinstance(self.args.method_options, str)
        return options_of(self.args.method, "policy")(**(self.args.method_options or {}))

    @cached_property
    def method(self) -> Method:
        """The method."""
        return self.options.build()

    @cached_property
    def problems(self) -> dict[str, list[Any]]:
        """At most `ROWS` training problems, as columns."""
        assert self.task is not None
        return self.task.train[:: math.ceil(len(self.task.train) / ROWS)]


def ratio_always_one(plan: Plan) -> Finding | None:
    """One optimiser step a rollout batch."""
    from ..parts.surrogate import unclipped_surrogate
    from ..stage import part_of

    args = plan.args
    if args.updates_per_rollout > 1 or part_of(plan.method.surrogate) is unclipped_surrogate:
        return None
    return Finding(
        "ratio_always_one",
        "warning",
        f"one optimiser step a rollout batch (steps_per_generation {args.steps_per_generation}, "
        f"gradient_accumulation_steps {args.gradient_accumulation_steps}, num_iterations {args.num_iterations})",
        f"the policy is still the one that drew the tokens, so every importance ratio is 1: {args.method} never "
        "clips, and methods that differ in their bounds are the same method",
        f"--steps_per_generation {4 * args.gradient_accumulation_steps}, for four optimiser steps a rollout batch",
    )


def uncorrected_sampler(plan: Plan) -> Finding | None:
    """Tokens drawn from another distribution than the policy, and no importance weight."""
    if plan.method.sampler_cap is not None:
        return None
    given = {name: getattr(plan.args, name) for name in TRUNCATIONS} | (plan.args.generation_kwargs or {})
    causes = [f"{name} {given[name]}" for name, plain in TRUNCATIONS.items() if given[name] not in (plain, None)]
    if plan.method.temperature_rule is not None:
        causes.append("the adaptive temperature")
    if plan.args.use_vllm:
        causes.append("use_vllm")
    if not causes:
        return None
    return Finding(
        "uncorrected_sampler",
        "warning",
        f"sampler_cap is off, while tokens are not drawn from the policy: {', '.join(causes)}",
        "the loss counts them as the policy's, so its gradient is biased towards what the sampler prefers; the "
        "weight min(exp(old - sampler), cap) takes that out",
        "--method_options '{\"sampler_cap\": 2.0}', or no option at all: 2.0 is the default",
    )


def truncated_ratios(plan: Plan) -> Finding | None:
    """Tokens are left out of the draw, and log-probs are over all."""
    from ..engines.trl.support import before_model, of_model, truncations
    from ..engines.trl.vllm import against_engine

    args = plan.args
    cut = truncations(args)
    if not cut:
        return None
    reasons = ["sampling_support is off: leave it out"] if args.sampling_support is False else []
    reasons += [*before_model(args, own_rollout=False), *against_engine(args)]
    if plan.architecture is not None:
        sizes = plan.architecture.get_text_config()
        reasons += of_model(args, vocabulary=sizes.vocab_size, images=False, router_loss=False)
    serves = args.use_vllm and args.vllm_mode == "server"
    if serves:
        reasons.append(f"a server tells what is left only if it is started with {' '.join(SERVER_FLAGS)}")
    if not reasons:
        return None
    return Finding(
        "truncated_ratios",
        "note" if serves and len(reasons) == 1 else "warning",
        f"{', '.join(cut)}, and log-probs over the whole vocabulary ({reasons[0].split(': ')[0]})",
        MISSING_MASS,
        reasons[0].split(": ")[-1],
    )


def temperature_range(plan: Plan) -> Finding | None:
    """Temperatures that get far from T_base."""
    from ..methods import TemperatureOptions

    rule = plan.options.temperature
    if rule is None:
        return None
    assert isinstance(rule, TemperatureOptions)
    low, high = _factors(rule)
    if low >= 0.5 and high <= 2.0:
        return None
    told = ", ".join(f"{name} {getattr(rule, name):g}" for name in ("tau", *CLAMPS.get(rule.rule, ())))
    remedy = json.dumps({"temperature": {"rule": rule.rule, "tau": 0.1}})
    return Finding(
        "temperature_range",
        "warning",
        f"the temperature rule {rule.rule!r} with {told} draws tokens at {low:.2g} to {high:.2g} times T_base",
        "below half of T_base sampling is nearly greedy and the answers of a group come out equal; above twice, "
        "text falls apart; and the importance weight that corrects for it reaches its cap",
        f"--method_options '{remedy}'",
    )


def _factors(rule: TemperatureOptions) -> tuple[float, float]:
    """Smallest and largest factor on T_base, of z-scores up to 3."""
    if rule.rule == "zscore":
        return max(1 - 3 * rule.tau, rule.t_min), min(1 + 3 * rule.tau, rule.t_max)
    return 1 - rule.tau, 1 + rule.tau


def small_groups(plan: Plan) -> Finding | None:
    """Groups of two or three."""
    size = plan.args.num_generations
    if size >= 4:
        return None
    half, tenth = (1 - p**size - (1 - p) ** size for p in (0.5, 0.1))
    return Finding(
        "small_groups",
        "warning",
        f"num_generations {size}: with right-or-wrong rewards {percent(half)} of the groups hold both if half of "
        f"the answers are right, {percent(tenth)} if a tenth is",
        "the other groups teach nothing, and mean and standard deviation of so few rewards are mostly noise",
        "--num_generations 8",
    )


def learning_rate(plan: Plan) -> Finding | None:
    """A learning rate a hundred times away from what is usual."""
    rates = {"full": 1e-6, "adapter": 1e-5, "gatera": 1e-4}
    found = judge_rate(plan.args.learning_rate, plan.model_config, plan.architecture, rates)
    if found is None:
        return None
    kind, usual, low = found
    return Finding(
        "learning_rate",
        "warning",
        f"learning_rate {plan.args.learning_rate:g} with {kind}",
        "the policy stays where it is, and so does the reward"
        if low
        else "one optimiser step moves the policy so far that answers fall apart before the reward can tell",
        f"--learning_rate {usual:g}, and from there in steps of 3",
    )


def judge_rate(
    rate: float, model: ModelConfig, architecture: PreTrainedConfig | None, rates: dict[str, float]
) -> tuple[str, float, bool] | None:
    """Of a rate a hundred times away from the usual one: what is trained, that one, and whether it is too low.

    `rates` are the usual ones of "full", "adapter" and "gatera", GateRA on HiRA.
    """
    gatera = getattr(model, "gatera", None)  # of the command line's config, which TRL's has not
    if gatera is not None and gatera.get("branch", "hira") == "hira":
        kind, usual = "GateRA on HiRA", rates["gatera"]  # the update is multiplied by the weights
    elif model.use_peft:
        kind, usual = "an adapter", rates["adapter"]
    else:
        kind, usual = "full fine-tuning", rates["full"]
    small_model = not model.use_peft and (architecture is None or _parameters(architecture) < 100e6)
    if usual / 100 <= rate and (small_model or rate <= 100 * usual):
        return None
    return kind, usual, rate < usual


def _parameters(architecture: PreTrainedConfig) -> float:
    """Number of weights of a decoder with these sizes, to a third or so: 12 d^2 a layer, and its embeddings."""
    sizes: Any = architecture.get_text_config()
    return 12 * sizes.num_hidden_layers * sizes.hidden_size**2 + sizes.vocab_size * sizes.hidden_size
