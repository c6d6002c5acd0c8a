"""The method that a trainer of TRL was given or that its config names, and arguments that it cannot honour."""

from __future__ import annotations

from typing import Any

import hapo

from ...method import Method
from ...methods import options_of, policy
from .config import HAPOConfig
from .options import NO_TEMPERATURE, check_generation, check_unscored
from .vllm import check_rule


def resolve_method(method: Method | None, args: HAPOConfig) -> Method:
    """The method that a trainer was given, or that its config names; `args.beta` then holds its KL weight.

    Raises:
        ValueError: its options disagree with those of `args`, or its log-probs are of another kind of model.
    """
    resolved = _resolve(method, args)
    check_likelihood(resolved, diffusion=args.trains_diffusion)
    return resolved


def check_likelihood(method: Method, *, diffusion: bool) -> None:
    """Raise a ValueError, unless the method's log-probs are those of this kind of model."""
    if method.likelihood is not None and not diffusion:
        raise ValueError(
            f"method {method.name!r} is one of masked-diffusion models: its log-probs come from views of a "
            f"response with tokens hidden, {method.likelihood}, which no autoregressive model has. Train such a "
            "model with hapo.trl.DiffusionTrainer, or choose another method"
        )
    if method.likelihood is None and diffusion:
        known = [name for name in hapo.methods("policy") if hapo.method(name).likelihood is not None]
        raise ValueError(
            f"method {method.name!r} reads the log-prob of each token given those before it, which a "
            f"masked-diffusion model does not have: choose one of {', '.join(known)}, or train an autoregressive "
            "model with HAPOTrainer"
        )


def _resolve(method: Method | None, args: HAPOConfig) -> Method:
    if method is not None:
        if not isinstance(method, Method):
            raise TypeError(f"method must be a Method, got {method!r}; a name goes into HAPOConfig(method=...)")
        weight = kl_weight(method)
        if args.beta is not None and args.beta != weight:
            raise ValueError(f"beta={args.beta} and the method's kl_coef={weight} disagree; set one of them")
        if args.use_bias_correction_kl and not method.options.get("unbiased_kl"):
            raise ValueError(
                "use_bias_correction_kl=True: build the method with unbiased_kl=True, or leave it out"
            )
        args.beta = weight  # TRL loads a reference model where this is not 0
        return method
    if args.beta is None:
        args.beta = options_of(args.method, "policy").kl_coef
    options = {**(args.method_options or {}), "kl_coef": args.beta}  # type: ignore[dict-item]
    if args.use_bias_correction_kl:
        options["unbiased_kl"] = True
    if options.get("multi_objective_aggregation") == "normalize_then_sum":
        options.setdefault("reward_weights", args.reward_weights)
    named = policy(args.method, **options)
    if named.penalty is not None and not args.beta:
        raise ValueError(
            f"method {named.name!r} has a KL penalty, and TRL loads a reference model only with beta > 0: "
            "set it, or switch the penalty off"
        )
    return named


def kl_weight(method: Method) -> float:
    """What TRL's beta is to be: above 0 where the method reads a reference policy."""
    options = getattr(method.penalty, "options", {})  # of a Stage
    if isinstance(options.get("coef"), float):
        return options["coef"]
    if "penalty" in method.options.get("replaced", ()):
        return 0.0 if method.penalty is None else 1.0
    return method.options.get("kl_coef") or (0.0 if method.penalty is None else 1.0)


def check_arguments(method: Method, args: HAPOConfig, model: Any, others: dict[str, Any]) -> None:
    """Refuse what a `HAPOTrainer` cannot honour; `others` are the trainer's further keyword arguments.

    Raises:
        ValueError: which argument, why, and what to set.
    """
    generation = args.generation_kwargs or {}
    if method.options.get("multi_objective_aggregation") == "normalize_then_sum":
        weights = method.options.get("reward_weights")
        if args.reward_weights is not None and list(weights or ()) != list(args.reward_weights):
            raise ValueError(
                f"reward_weights={args.reward_weights} and those of the method, {weights}, disagree; set one"
            )
        if args.overlong_buffer:
            raise ValueError(
                f"overlong_buffer={args.overlong_buffer} changes the sum of the rewards, and normalize_then_sum "
                "reads each reward alone: set it to 0, and add a reward function for the length"
            )
    if args.use_vllm:
        check_rule(method)
    rollout = others.get("rollout_func")
    own = rollout is not None and not getattr(rollout, "draws_with_trainer", False)
    if own and method.temperature_rule is not None:
        raise ValueError(
            f"method {method.name!r} adapts the sampling temperature, and a rollout_func samples by itself: "
            f"let the trainer generate, or {NO_TEMPERATURE}"
        )
    adapters = [others["peft_config"]] if others.get("peft_config") is not None else []
    adapters += getattr(model, "peft_config", {}).values()
    for adapter in adapters:
        if getattr(adapter, "is_prompt_learning", False):
            kind = getattr(adapter.peft_type, "value", adapter.peft_type)
            raise ValueError(
                f"{kind} is prompt-learning: with its vectors before the prompt, generation in transformers and "
                "PEFT draws from another policy than a forward pass scores. Take an adapter of the layers, "
                "peft_config=LoraConfig(...)"
            )
        if args.use_vllm and getattr(adapter, "peft_type", None) == "GATERA":
            raise ValueError(
                "use_vllm takes merged weights, and a GateRA adapter cannot be merged: its gate makes the weight "
                "depend on the token. Set use_vllm=False, or take LoRA"
            )
    peft = bool(adapters)
    if args.beta and not (isinstance(model, str) or model.config._name_or_path or peft):
        raise ValueError(
            f"beta={args.beta} needs a reference model, which TRL loads by the model's path, and this one has "
            "none: save it and hand over the folder, or set beta=0"
        )
    if not args.temperature > 0:
        raise ValueError(
            f"temperature={args.temperature}: it must be above 0, or all answers of a group are equal"
        )
    check_generation(generation, vllm=args.use_vllm)
    if not args.score_rollouts:
        check_unscored(args, others)
