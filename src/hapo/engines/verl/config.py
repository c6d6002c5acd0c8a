"""What the configuration of verl must say for a `Method`, checked before any worker starts. Needs no verl."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import hapo

from ...method import Method
from ...methods import policy
from ...methods._options import check_names
from ...parts.penalty import kl_penalty
from ...samplers.rule import temperature_of
from ...stage import part_of
from ...versions import check_vllm

NAME = "hapo"
"""Of the trainer mode, the advantage estimator, the policy loss, and the section of the configuration."""

ADVANTAGE = "algorithm.adv_estimator"
LOSS = "actor_rollout_ref.actor.policy_loss.loss_mode"
MODE = "trainer.v1.trainer_mode"
ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
CORRECTION = "algorithm.rollout_correction"

MAIN, SFT, VERLS_MAIN = "hapo.verl_main", "hapo.verl_sft", "verl.trainer.main_ppo"
"""The modules that start a run: rollouts without verl's queue, demonstrations, and rollouts with the queue."""

TEMPERED_BY = ("vllm", "transformers")
"""Rollouts that apply the rule of a request."""

NO_DEMONSTRATIONS = (
    "an optimiser step of verl is one call of its engine, on rows of the rollout and with one loss, and rows of "
    "demonstrations in it would enter verl's KL penalty, entropy bonus and counts of tokens"
)

DECIDED_BY_METHOD: dict[str, tuple[Any, str]] = {
    f"{ACTOR}.clip_ratio": (0.2, "+hapo.options.eps_low and eps_high"),
    f"{ACTOR}.clip_ratio_low": (0.2, "+hapo.options.eps_low"),
    f"{ACTOR}.clip_ratio_high": (0.2, "+hapo.options.eps_high"),
    f"{ACTOR}.clip_ratio_c": (3.0, "+hapo.options.dual_clip"),
    "algorithm.gamma": (1.0, "+hapo.options.advantage=token_reward and +hapo.options.gamma"),
    "algorithm.lam": (1.0, "nothing: no method has a critic"),
    "algorithm.norm_adv_by_std_in_grpo": (True, "+hapo.method=dr_grpo"),
}
"""verl's option -> its default, and what to set instead."""


@dataclass(frozen=True)
class Settings:
    """The section `hapo` of verl's configuration: `+hapo.method=hapo +hapo.options.eps_high=0.28`.

    Raises:
        ValueError: an unknown key, or a value out of its range.
    """

    method: str
    """A method of `hapo.methods("policy")`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the method, but for `kl_coef` and `sampler_cap`, which are verl's to set."""
    run_records: bool = True
    """Write config.yaml, manifest.json, metrics.jsonl and tokens/ into `trainer.default_local_dir`."""
    record_tokens_every: int = 10
    """Rollout batches between token records, besides the first; 0 writes none."""
    record_tokens_rows: int = 128
    """Responses of a token record, at most: whole groups."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in (("record_tokens_every", 0), ("record_tokens_rows", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"hapo.{name} must be an integer >= {least}, got {getattr(self, name)!r}")
        for name, remedy in (
            ("kl_coef", f"set {ACTOR}.use_kl_loss=True and kl_loss_coef: the penalty is verl's own"),
            (
                "sampler_cap",
                f"set {CORRECTION}.rollout_is=token and rollout_is_threshold: the weight is verl's own",
            ),
        ):
            if name in self.options and not (name == "kl_coef" and self.options[name] == 0):
                raise ValueError(f"hapo.options.{name}={self.options[name]!r} cannot be honoured: {remedy}")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Settings:
        """Read the section of a whole configuration."""
        section = config.get(NAME)
        if not section or not section.get("method"):
            known = ", ".join(hapo.methods("policy"))
            raise ValueError(f"hapo's trainer needs a method: set +hapo.method=hapo, or any of {known}")
        if section["method"] in hapo.methods("supervised"):
            raise ValueError(
                f"method {section['method']!r} learns from demonstrations, and verl's PPO trainers have rollouts "
                f"alone: run python -m {SFT}"
            )
        for key in section:
            if key.startswith("demonstration"):
                raise ValueError(
                    f"hapo.{key} cannot be honoured: {NO_DEMONSTRATIONS}. Use hapo.trl.HAPOTrainer, or train with "
                    f"demonstrations first (python -m {SFT}), and then with rollouts"
                )
        check_names("the section hapo of the configuration", section, [f.name for f in fields(cls)])
        return cls(**section)


def refuse_half_set(arguments: Sequence[str], program: str = VERLS_MAIN) -> None:
    """Look at a command line of verl: only there can a stock trainer be refused, which would ignore the section,
    or call the estimator after its first rollout, without the entropies.

    Args:
        arguments: overrides.
        program: the module that was started, of `program_of`.

    Raises:
        ValueError: it asks for hapo, and the trainer is not hapo's.
    """
    given = dict(a.lstrip("+").partition("=")[::2] for a in arguments if "=" in a)
    section = any(key.startswith(f"{NAME}.") for key in given)
    if not section and NAME not in (given.get(ADVANTAGE), given.get(LOSS)):
        return
    if program == SFT:
        return
    if given.get("trainer.use_v1", "true").lower() == "false":
        if program != MAIN:
            raise ValueError(
                f"verl's main has no registry of trainers without a queue: run python -m {MAIN} instead"
            )
        return
    if program == MAIN:
        raise ValueError(f"{MAIN} runs the trainer without a queue: set trainer.use_v1=False, or run {VERLS_MAIN}")
    mode = given.get(MODE, "sync")
    if mode != NAME:
        raise ValueError(wrong_mode(mode))


def program_of(command: Sequence[str]) -> str:
    """The module that this process was started with: one of hapo's for verl, or else verl's own."""
    for ours in (MAIN, SFT):
        if any(word == ours or word.endswith(ours.replace(".", "/") + ".py") for word in command):
            return ours
    return VERLS_MAIN


def wrong_mode(mode: str | None = None) -> str:
    """Why a stock trainer, of this mode, cannot run a method."""
    reason = (
        f"a method needs the rollout's entropies, which verl's own trainers do not hand on: set {MODE}={NAME}, "
        f"which runs verl's synchronous trainer, or run python -m {MAIN} with trainer.use_v1=False"
    )
    if mode is None:
        return reason
    if "async" in mode:
        reason += ". Batches that mix rollouts of several policies and temperatures are not supported"
    return f"{reason} (got {mode})"


def select(config: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value at a dotted path; the default where a key is missing or holds None."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return default if value is None else value


def resolve_method(config: Mapping[str, Any], settings: Settings) -> Method:
    """The method with the KL weight and the sampler's cap that verl's configuration says.

    Raises:
        ValueError: unknown method or option, a method of diffusion models, or a penalty per token without a
            reference model.
    """
    named = policy(settings.method, **settings.options)
    if named.likelihood is not None:
        raise ValueError(
            f"method {named.name!r} is one of masked-diffusion models, which verl does not train: use "
            "hapo.trl.DiffusionTrainer, or choose another method"
        )
    cap = _cap(config)
    if cap is not None and named.sampler_cap is None:
        raise ValueError(
            f"method {named.name!r} corrects for the sampler by itself: set {CORRECTION}.rollout_is=null"
        )
    changes: dict[str, Any] = {"sampler_cap": cap}
    weight = named.options["kl_coef"] if named.penalty is not None else 0.0
    own, uses_kl = _own_penalty(named), bool(select(config, f"{ACTOR}.use_kl_loss"))
    if own and not (uses_kl and select(config, f"{ACTOR}.kl_loss_coef") == 0):
        raise ValueError(
            f"method {named.name!r} weighs the KL penalty token by token: set {ACTOR}.use_kl_loss=True (for the "
            f"reference model) and {ACTOR}.kl_loss_coef=0 (for no second penalty), or +hapo.options.kl_coef=0"
        )
    if not own:
        if weight and not uses_kl:
            warnings.warn(
                f"method {named.name!r} has a KL penalty of weight {weight} in its paper, and verl's is "
                f"off: set {ACTOR}.use_kl_loss=True {ACTOR}.kl_loss_coef={weight} "
                f"{ACTOR}.kl_loss_type=low_var_kl for it, or +hapo.options.kl_coef=0 to train without",
                stacklevel=2,
            )
        changes["kl_coef"] = 0.0
    return policy(settings.method, **{**settings.options, **changes})


def check(config: Mapping[str, Any], method: Method, *, queue: bool = True) -> None:
    """Refuse what this engine cannot honour, with what to set instead.

    Args:
        config: the whole of verl's configuration.
        method: what is trained.
        queue: the trainer is verl's default one.

    Raises:
        ValueError: which option, why, and the remedy.
        ImportError: the rollout's engine is missing, or of a version that was not tested.
    """
    for path in (ADVANTAGE, LOSS):
        if select(config, path) != NAME:
            raise ValueError(f"hapo's trainer needs {path}={NAME}, got {select(config, path)}")
    if select(config, f"{CORRECTION}.bypass_mode"):
        raise ValueError(
            f"{CORRECTION}.bypass_mode=True takes the sampler's log-probs for the old policy's and skips the pass "
            "that computes the entropies: set it to False"
        )
    strategy = select(config, f"{ACTOR}.strategy")
    if strategy not in ("fsdp", "fsdp2"):
        raise ValueError(f"{ACTOR}.strategy={strategy} was not tested: set fsdp2 or fsdp")
    for path in ("critic.enable", "distillation.enabled"):
        if select(config, path):
            raise ValueError(f"{path}=True cannot be honoured: no method has a critic or a teacher; leave it out")
    for path, (default, instead) in DECIDED_BY_METHOD.items():
        value = select(config, path, default)
        if value != default:
            raise ValueError(f"{path}={value} cannot be honoured: the method decides it; set {instead}")
    computed = select(config, f"{ACTOR}.calculate_entropy") or select(config, f"{ACTOR}.entropy_coeff")
    if method.loss_reads_entropy and not computed:
        raise ValueError(
            f"method {method.name!r} reads the current policy's entropy: set {ACTOR}.calculate_entropy=True"
        )
    if method.breaks & {"split"} and select(config, f"{ACTOR}.use_dynamic_bsz"):
        raise ValueError(
            f"method {method.name!r} with these options takes statistics over micro-batches, and "
            f"{ACTOR}.use_dynamic_bsz=True makes those by length: set it to False"
        )
    sequence = f"{ACTOR}.ulysses_sequence_parallel_size"
    if method.step_reads_policy and select(config, sequence, 1) > 1:
        old = ", or +hapo.options.entropy_source=old" if "entropy_source" in method.options else ""
        raise ValueError(
            f"method {method.name!r} scores the current policy before each step, which was not tested with "
            f"{sequence}={select(config, sequence)}: set it to 1{old}"
        )
    verdict = select(config, "algorithm.filter_groups.metric", "reward")
    reward_model = select(config, "reward.reward_model", {})
    if verdict != "reward" and reward_model.get("enable") and not reward_model.get("enable_resource_pool"):
        raise ValueError(
            f"algorithm.filter_groups.metric={verdict} names the verdict, and a colocated reward model has none: "
            "set it to reward, or reward.reward_model.enable_resource_pool=True"
        )
    _check_correction(config)
    if not queue:
        _check_without_queue(config, method)
    if method.temperature_rule is not None:
        _check_temperature(config, method)
    if select(config, f"{ROLLOUT}.name") == "vllm":
        _check_vllm(tempered=method.temperature_rule is not None)
    rows = select(config, "data.train_batch_size")
    if rows == select(config, f"{ACTOR}.ppo_mini_batch_size") and select(config, f"{ACTOR}.ppo_epochs", 1) == 1:
        warnings.warn(
            f"One optimiser step a rollout batch: every importance ratio is 1, and nothing is ever clipped. Set "
            f"{ACTOR}.ppo_mini_batch_size to a fraction of data.train_batch_size={rows} (the paper: 1/16), or "
            "ppo_epochs > 1, for the method's bounds to act.",
            stacklevel=2,
        )


def _own_penalty(method: Method) -> bool:
    """The method weighs its penalty token by token, which verl's own cannot."""
    return method.penalty is not None and part_of(method.penalty) is not kl_penalty


def _check_without_queue(config: Mapping[str, Any], method: Method) -> None:
    if select(config, "trainer.use_v1", False):
        raise ValueError(f"trainer.use_v1=True is run by python -m {VERLS_MAIN}: set it to False for {MAIN}")
    if select(config, "algorithm.filter_groups.enable"):
        raise ValueError(
            "algorithm.filter_groups.enable=True is not honoured by verl's trainer without a queue: leave it out. "
            "Methods with filter_groups drop groups of equal verdicts without replacing them"
        )
    if not select(config, "trainer.balance_batch", True):
        raise ValueError(
            "trainer.balance_batch=False hides the step's metrics from this engine in verl's trainer without a "
            "queue: set it to True"
        )
    path = f"{ROLLOUT}.agent.agent_loop_manager_class"
    if method.temperature_rule is not None and select(config, path):
        raise ValueError(
            f"{path}={select(config, path)} takes the place of the one that sends the adaptive temperature: leave "
            "it out, or switch the temperature off (+hapo.options.components=BCD for hapo)"
        )


def _check_correction(config: Mapping[str, Any]) -> None:
    if select(config, f"{CORRECTION}.rollout_is") and not select(config, f"{ROLLOUT}.calculate_log_probs"):
        raise ValueError(
            f"{CORRECTION}.rollout_is needs the sampler's log-probs: set {ROLLOUT}.calculate_log_probs=True"
        )


def _check_temperature(config: Mapping[str, Any], method: Method) -> None:
    off = '+hapo.options.components=BCD for hapo, no "temperature" for other methods'
    if temperature_of(method) is None:
        raise ValueError(
            f"method {method.name!r} adapts the temperature by a function of its own, and requests carry numbers "
            "only: build it from its options"
        )
    rollout = select(config, f"{ROLLOUT}.name")
    if rollout not in TEMPERED_BY:
        raise ValueError(
            f"the adaptive temperature was not tested in verl's {rollout} rollout: set {ROLLOUT}.name=vllm, or "
            f"switch it off ({off})"
        )
    mode = select(config, f"{ROLLOUT}.logprobs_mode", "processed_logprobs")
    if mode != "processed_logprobs":
        raise ValueError(
            f"{ROLLOUT}.logprobs_mode={mode} returns log-probs of another distribution than the one that draws: "
            "set processed_logprobs"
        )
    if not select(config, f"{CORRECTION}.rollout_is"):
        raise ValueError(
            "with an adaptive temperature another distribution draws than the policy, and the importance ratio "
            f"must know it: set {CORRECTION}.rollout_is=token, or switch the temperature off ({off})"
        )


def _check_vllm(tempered: bool) -> None:
    if find_spec("vllm") is None:
        raise ImportError(f"{ROLLOUT}.name=vllm, and vLLM is not installed: pip install vllm")
    try:
        found = version("vllm")
    except PackageNotFoundError:
        raise ImportError(
            "verl looks for a distribution named vllm, and this vLLM has another name: install it as vllm, or a "
            "distribution of that name without modules beside it, as tests/verl/vllm_name is"
        ) from None
    if tempered:
        try:
            check_vllm(found)
        except ValueError as error:
            raise ImportError(str(error)) from None


def _cap(config: Mapping[str, Any]) -> float | None:
    """The cap of a truncated token weight; None where verl weighs in another way, or not at all."""
    other = select(config, f"{CORRECTION}.rollout_is_batch_normalize")
    if select(config, f"{CORRECTION}.rollout_is") != "token" or other:
        return None
    try:
        return float(select(config, f"{CORRECTION}.rollout_is_threshold", 2.0))
    except ValueError:  # IcePop's two bounds
        return None


def recipe(config: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """The configuration in the names of the TRL engine's records, and the whole of verl's beside it."""
    named = {
        "model_name_or_path": "actor_rollout_ref.model.path",
        "learning_rate": f"{ACTOR}.optim.lr",
        "num_generations": f"{ROLLOUT}.n",
        "max_completion_length": "data.max_response_length",
        "temperature": f"{ROLLOUT}.temperature",
        "top_p": f"{ROLLOUT}.top_p",
    }
    told = {name: select(config, path) for name, path in named.items()}
    top_k = select(config, f"{ROLLOUT}.top_k", -1)
    penalty = select(config, f"{ACTOR}.kl_loss_coef") if select(config, f"{ACTOR}.use_kl_loss") else 0.0
    own = method.options["kl_coef"] if _own_penalty(method) else None
    return {
        **{name: value for name, value in told.items() if value is not None},
        **({"top_k": top_k} if top_k > 0 else {}),
        "engine": "verl",
        "method": method.name,
        "method_options": {k: v for k, v in method.options.items() if k not in ("method", "kl_coef")},
        "beta": penalty if own is None else own,
        "verl": {k: v for k, v in config.items() if k != "ray_kwargs"},  # which may hold keys of trackers
    }
