"""TRL's options, one by one: what a method decides, what the engine reads, what is refused with the remedy."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from ...method import Method
from ...methods._options import check_names
from ...parts.advantage import group_advantage
from ...parts.ratio import sequence_ratio, token_ratio
from ...parts.turns import turn_advantage
from ...stage import part_of

DECIDED_BY_METHOD = {
    "loss_type": 'choose the method, e.g. method="cispo"',
    "epsilon": 'set method_options={"eps_low": ...}',
    "epsilon_high": 'set method_options={"eps_high": ...}',
    "delta": 'set method_options={"dual_clip": ...}',
    "importance_sampling_level": 'method="gspo" or "luspo" has one ratio per response, the others one per token',
    "scale_rewards": 'set method_options={"scale_rewards": ...}, where `hapo methods NAME` lists it',
    "multi_objective_aggregation": (
        'set method_options={"multi_objective_aggregation": "normalize_then_sum"}, where `hapo methods NAME` '
        "lists it"
    ),
    "top_entropy_quantile": 'choose method="forking_tokens", method_options={"rho": ...}',
    "off_policy_mask_threshold": 'set method_options={"off_policy_mask_threshold": ...}',
    "sapo_temperature_neg": 'choose method="sapo", method_options={"tau_neg": ...}',
    "sapo_temperature_pos": 'choose method="sapo", method_options={"tau_pos": ...}',
    "vespo_k_pos": 'choose method="vespo", method_options={"k_pos": ...}',
    "vespo_k_neg": 'choose method="vespo", method_options={"k_neg": ...}',
    "vespo_lambda_pos": 'choose method="vespo", method_options={"lambda_pos": ...}',
    "vespo_lambda_neg": 'choose method="vespo", method_options={"lambda_neg": ...}',
    "vllm_importance_sampling_correction": 'set method_options={"sampler_cap": null} for none, or a cap',
    "vllm_importance_sampling_mode": "the correction is per token, truncated at method_options['sampler_cap']",
    "vllm_importance_sampling_clip_max": 'set method_options={"sampler_cap": ...}',
    "vllm_importance_sampling_clip_min": "the correction has no lower bound",
    "vllm_importance_sampling_cap": 'set method_options={"sampler_cap": ...}',
    "use_liger_kernel": "leave it out: log-probs come from hapo.scoring, which makes no logits either",
}
"""TRL options that a method decides, and what to do where they ask for something else."""

READ = {
    "beta": "the method's `kl_coef`; default: the method's own",
    "use_bias_correction_kl": "the method's `unbiased_kl`; TRL's default is on, ours off, as in the papers",
    "temperature": "T_base: of sampling, log-probs and entropies",
    "steps_per_generation": "default: 4 optimiser steps on a rollout batch",
    "generation_batch_size": "as in TRL; it fills in `steps_per_generation`",
    "num_iterations": "passes over the rollout batch; each optimiser step has its own totals",
    "num_generations": "the size of a group",
    "max_completion_length": "as in TRL; `overlong_buffer` counts back from it",
    "mask_truncated_completions": "cut-off responses learn nothing, but count in their group",
    "reward_weights": "weights of the rewards in the verdict, and in the method's normalize_then_sum",
    "entropy_coef": "weight of the mean entropy of the step's kept tokens, whatever the micro-batches",
    "use_adaptive_entropy": "as in TRL, by the entropy of the whole step",
    "entropy_coef_min": "with `use_adaptive_entropy`",
    "entropy_coef_max": "with `use_adaptive_entropy`",
    "entropy_coef_delta": "with `use_adaptive_entropy`",
    "entropy_target": "with `use_adaptive_entropy`, nats",
    "generation_kwargs": "as in TRL, for plain sampling; what has an option of its own is refused here",
    "top_p": "sampling, and all log-probs are over what is left (`sampling_support`)",
    "top_k": "sampling, and all log-probs are over what is left (`sampling_support`)",
    "min_p": "sampling, and all log-probs are over what is left (`sampling_support`)",
    "repetition_penalty": "sampling alone: the method's weight corrects for it",
    "use_vllm": "temperature rules go out with every request",
    "router_aux_loss_coef": "the weight of the first auxiliary loss",
    "cast_lm_head_to_fp32": "accepted: `hapo.scoring` sums in float32 whatever the dtype of the weights",
    "use_transformers_continuous_batching": "as in TRL, with temperature rules",
}
"""TRL options that the engine itself reads, and what it makes of them."""

NO_TEMPERATURE = (
    'switch that off: method_options={"components": "BCD"} for hapo, no "temperature" for other methods'
)
"""What to do where an adaptive temperature cannot act."""

LOSS_TYPES = {
    "bnpo": 'method="dapo", method_options={"eps_high": 0.2, "filter_groups": false}',
}
"""Loss types of TRL without a method of that name -> what to take."""


def done_by(method: Method) -> dict[str, Any]:
    """What a method does, as TRL's options say it; an option that it has no value of is left out."""
    options = method.options
    ratio = part_of(method.ratio)
    done: dict[str, Any] = {
        "loss_type": method.name,
        "importance_sampling_level": {token_ratio: "token", sequence_ratio: "sequence"}.get(ratio),
        "multi_objective_aggregation": options.get("multi_objective_aggregation", "sum_then_normalize"),
        "off_policy_mask_threshold": options.get("off_policy_mask_threshold"),
        "top_entropy_quantile": 1.0 if method.select is None else options.get("rho"),
        "vllm_importance_sampling_correction": method.sampler_cap is not None,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": method.sampler_cap,
        "vllm_importance_sampling_cap": method.sampler_cap,
    }
    if part_of(method.advantage) in (group_advantage, turn_advantage):
        done["scale_rewards"] = getattr(method.advantage, "options", {}).get("scale", "group")
    names = {"epsilon": "eps_low", "epsilon_high": "eps_high", "delta": "dual_clip"}
    names |= {"sapo_temperature_neg": "tau_neg", "sapo_temperature_pos": "tau_pos"}
    names |= {f"vespo_{name}": name for name in ("k_pos", "k_neg", "lambda_pos", "lambda_neg")}
    return done | {theirs: options[ours] for theirs, ours in names.items() if ours in options}


def check_unscored(args: Any, others: dict[str, Any]) -> None:
    """Refuse `score_rollouts=False` where vLLM would not know the policy's log-probs.

    Raises:
        ValueError: which option is in the way.
    """
    plain = {"use_vllm": True, "vllm_mode": "colocate", "repetition_penalty": 1.0}
    plain |= {"vllm_structured_outputs_regex": None}
    given = [f"{name}={getattr(args, name)!r}" for name, value in plain.items() if getattr(args, name) != value]
    given += [f"generation_kwargs={args.generation_kwargs}"] if args.generation_kwargs else []
    given += [name for name in ("rollout_func", "environment_factory", "tools") if others.get(name)]
    if given:
        raise ValueError(
            "score_rollouts=False takes the policy's log-probs from a vLLM in this process, which draws answers "
            f"of one turn, without penalties: drop {', '.join(given)}, or score the rollouts"
        )


INSTEAD = {
    "temperature": "set the option temperature, which scoring reads too",
    "top_p": "set the option top_p",
    "top_k": "set the option top_k",
    "max_new_tokens": "set the option max_completion_length",
    "max_tokens": "set the option max_completion_length",
    "max_length": "set the option max_completion_length",
    "num_return_sequences": "set the option num_generations",
    "n": "set the option num_generations",
    "return_dict_in_generate": "rollouts are token ids, and the sampler records their log-probs",
    "output_scores": "rollouts are token ids, and the sampler records their log-probs",
    "output_logits": "rollouts are token ids, and the sampler records their log-probs",
}
"""Key of generation_kwargs -> what to do in its place."""


def check_generation(given: dict[str, Any], *, vllm: bool) -> None:
    """Refuse what plain sampling cannot honour, before anything is generated."""
    for name, value in given.items():
        if name in INSTEAD and value not in (None, False):
            raise ValueError(f"generation_kwargs: {name}={value!r} cannot be honoured: {INSTEAD[name]}")
    if given.get("do_sample", True) is False:
        raise ValueError("generation_kwargs: do_sample=False is greedy, and all answers of a group are equal")
    if vllm:
        return  # SamplingParams names what it does not know
    known = [*GenerationConfig().to_dict(), "assistant_model"]
    check_names("generation_kwargs", given, known)
    own = {name: value for name, value in given.items() if name != "assistant_model"}
    mode = GenerationConfig(**{"do_sample": True, **own}).get_generation_mode(given.get("assistant_model"))
    if mode is not GenerationMode.SAMPLE:
        raise ValueError(
            f"generation_kwargs: {given} is {mode.value.replace('_', ' ')}, and policies are sampled, one token a "
            "step: leave it out"
        )
