"""Options that methods share, and what they build of them. A method's own file adds the rest."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..batch import EntropyStats
from ..method import Method
from ..parts.advantage import Scale, decoupled_advantage, group_advantage
from ..parts.credit import Finished, position_returns
from ..parts.entropy import entropy_stats
from ..parts.penalty import kl_penalty, unbiased_kl_penalty
from ..parts.select import on_policy
from ..parts.temperature import bounded_factor, zscore_factor
from ..parts.turns import turn_advantage, turn_returns
from ..stage import Stage, When
from ..supervised import Supervised

Kind = Literal["policy", "supervised"]
"""What a method learns from: rollouts and rewards, or demonstrations."""


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    title: str
    arxiv: str
    year: int


@dataclass(frozen=True, kw_only=True)
class TemperatureOptions:
    """HAPO's sampling temperature (arXiv 2509.16591, eq. 8): T = T_base (1 + tau h), h the entropy signal.

    It is orthogonal to the loss, so every method takes it: `temperature={"tau": 0.1}`.

    Raises:
        ValueError: a value is out of its range, named in the message.
    """

    tau: float = 0.1
    """Strength (paper)."""
    rule: Literal["bounded", "zscore"] = "bounded"
    """1 + tau clip(h, -1, 1), or the paper's eq. 8 with its z-score, clamped to [t_min, t_max]."""
    rho: float = 0.8
    """Quantile of log entropy that is the pivot (paper)."""
    t_min: float = 0.1
    """Lower clamp of the z-score rule, as a factor on T_base (ours; the paper states none)."""
    t_max: float = 2.0
    """Upper clamp of the z-score rule, as a factor on T_base (ours)."""
    variant: Literal["paper", "release"] = "paper"
    """Sign of the lower branch of h: the paper's, or as the authors' code computes it."""

    needs_stats: ClassVar[bool] = True
    """The rule reads statistics of a rollout or of a calibration."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_numbers(self)
        one_of("rule", self.rule, ("bounded", "zscore"))
        one_of("variant", self.variant, ("paper", "release"))
        if self.rule == "bounded":
            safe = "in [0, 1): from 1 on, the temperature 1 + tau h of the most certain token is 0 or negative"
            require(0 <= self.tau < 1, "tau", self.tau, safe)
        require(0 <= self.tau < math.inf, "tau", self.tau, ">= 0 and finite")
        require(0 <= self.rho <= 1, "rho", self.rho, "in [0, 1]")
        require(0 < self.t_min <= 1, "t_min", self.t_min, "in (0, 1]: a temperature must stay positive")
        require(1 <= self.t_max < math.inf, "t_max", self.t_max, ">= 1 and finite")

    @classmethod
    def of(cls, value: TemperatureOptions | Mapping[str, Any], **defaults: Any) -> TemperatureOptions:
        """The rule that a mapping of its options describes, as it comes from YAML or the command line."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f'temperature must be a mapping such as {{"tau": 0.1}}, or None, got {value!r}')
        check_names("temperature", value, [f.name for f in fields(cls)])
        return cls(**{**defaults, **value})

    @property
    def acts(self) -> bool:
        """Whether any temperature differs from T_base."""
        return self.tau > 0

    @property
    def factor(self) -> Callable[[Tensor, EntropyStats], Tensor]:
        """(entropies in nats, of softmax(logits / T_base); statistics) -> factor on T_base."""
        if self.rule == "zscore":
            return partial(zscore_factor, tau=self.tau, low=self.t_min, high=self.t_max)
        return partial(bounded_factor, tau=self.tau, variant=self.variant)


@dataclass(frozen=True, kw_only=True)
class MethodOptions(ABC):
    """What the options of a method say of it, whatever its kind."""

    name: ClassVar[str]
    kind: ClassVar[Kind]
    paper: ClassVar[Paper]
    summary: ClassVar[str]

    @abstractmethod
    def build(self) -> Method | Supervised:
        """The method with these options."""


@dataclass(frozen=True, kw_only=True)
class SupervisedOptions(MethodOptions, ABC):
    """Options of the methods that learn from demonstrations; each adds its own."""

    kind: ClassVar[Kind] = "supervised"

    @abstractmethod
    def build(self) -> Supervised:
        """The method with these options."""


@dataclass(frozen=True, kw_only=True)
class Options(MethodOptions, ABC):
    """What every policy method can be told; each method adds its own.

    Raises:
        ValueError: a value is out of its range, named in the message.
    """

    kind: ClassVar[Kind] = "policy"

    advantages: ClassVar[tuple[str, ...]] = ("outcome", "token_reward")  # what `advantage` may be

    advantage: Literal["outcome", "token_reward", "turn_reward"] = "outcome"
    """What the advantage compares: rewards of responses, or, at each position, the returns of `token_reward` from
    there on (`parts.credit.position_returns`), or at each turn those of the turns (`parts.turns`; methods that
    take a reward relative to its group). Rewards on the last tokens alone give the same in all."""
    gamma: float = 1.0
    """Discount of rewards per token, or per turn, for token rewards."""
    finished: Finished = "last"
    """Where a response that has ended stands at later positions, or turns, of its group, for token rewards: with
    the return of its last one, or out of their statistics."""
    filter_groups: bool = False
    """Drop groups whose verdicts are all equal (DAPO's dynamic sampling)."""
    singleton: Literal["zero", "reward"] = "zero"
    """Advantage of a group of one: 0, or its reward (verl's; over 1 + 1e-6 where a deviation divides)."""
    kl_coef: float = 0.0
    """Weight of the k3 penalty towards a reference policy."""
    unbiased_kl: bool = False
    """Multiply k3 by the importance ratio, gradient included, so that its gradient is unbiased when the policy has
    moved on (DeepSeek-V3.2, arXiv 2512.02556; TRL's `use_bias_correction_kl`)."""
    sampler_cap: float | None = 2.0
    """Cap of the importance weight min(exp(old - sampler), cap), used where the batch knows its sampler's
    log-probs; None switches the weight off."""
    off_policy_mask_threshold: float | None = None
    """Responses of negative advantage whose tokens have lost more than this in log-prob since they were drawn,
    nats on average, add nothing (off-policy sequence mask of DeepSeek-V3.2, arXiv 2512.02556); None: all add."""
    temperature: TemperatureOptions | Mapping[str, Any] | None = None
    """HAPO's adaptive sampling temperature, e.g. {"tau": 0.1}; its keys: tau, rule, rho, t_min, t_max, variant."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_numbers(self)
        require(self.kl_coef >= 0, "kl_coef", self.kl_coef, ">= 0")
        require(self.sampler_cap is None or self.sampler_cap > 0, "sampler_cap", self.sampler_cap, "> 0, or None")
        one_of("singleton", self.singleton, ("zero", "reward"))
        one_of("advantage", self.advantage, self.advantages)
        one_of("finished", self.finished, ("last", "out"))
        require(0 <= self.gamma <= 1, "gamma", self.gamma, "in [0, 1]")
        if self.advantage == "outcome":
            unread = "at its default where the advantage is of outcomes: advantage='token_reward' reads it"
            for name in ("gamma", "finished"):
                require(getattr(self, name) == getattr(Options, name), name, getattr(self, name), unread)
        threshold = self.off_policy_mask_threshold
        require(threshold is None or threshold >= 0, "off_policy_mask_threshold", threshold, ">= 0, or None")
        if self.temperature is not None:
            object.__setattr__(self, "temperature", TemperatureOptions.of(self.temperature))

    @abstractmethod
    def build(self) -> Method:
        """The method with these options."""

    @property
    def earned(self) -> Literal["reward", "returns"]:
        """The field of the record that the advantage compares."""
        return "reward" if self.advantage == "outcome" else "returns"

    def shared(self, **own: Any) -> dict[str, Any]:
        """What every `build` hands to `Method`: name, filter, credit, sampler's weight, off-policy mask, rule."""
        rule = self.temperature
        shared: dict[str, Any] = {
            "name": self.name,
            "filter_groups": self.filter_groups,
            "sampler_cap": self.sampler_cap,
        }
        if self.advantage != "outcome":
            returns = {"gamma": self.gamma, "finished": self.finished}
            by_turn = self.advantage == "turn_reward"
            part, more = (turn_returns, ("turn",)) if by_turn else (position_returns, ())
            shared["credit"] = Stage(part, "token_reward", "reward", "mask", *more, **returns)
        if self.off_policy_mask_threshold is not None:
            limit = self.off_policy_mask_threshold
            reads = ("logp", "drawn_logp", "advantage", "mask")
            shared["trusted"] = Stage(on_policy, *reads, threshold=limit)
        if isinstance(rule, TemperatureOptions):
            shared["stats"] = Stage(entropy_stats, "old_entropy", "mask", rho=rule.rho)
            shared["temperature_rule"] = rule.factor if rule.acts else None
        return {**shared, **own}

    def kl(self) -> Stage[Tensor] | None:
        """The penalty of most methods: `kl_coef` times k3 on every valid token; None where the weight is 0."""
        if not self.kl_coef:
            return None
        if self.unbiased_kl:
            return Stage(unbiased_kl_penalty, "ratio", "logp", "ref_logp", "mask", coef=self.kl_coef)
        return Stage(kl_penalty, "logp", "ref_logp", "mask", coef=self.kl_coef)


@dataclass(frozen=True, kw_only=True)
class ClippedOptions(Options, ABC):
    """Options of the methods that hold the ratio between bounds."""

    eps_low: float = 0.2
    """Lower clip range: 0.2 where a paper states one (but GSPO's), and in verl and TRL."""
    eps_high: float = 0.2
    """Upper clip range: 0.2 in GRPO's successors without clip-higher, and in verl and TRL."""
    dual_clip: float | None = None
    """Cap c > 1 on the ratio of negative advantages, without a gradient beyond; off here (verl: always on, 3)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(0 < self.eps_low < 1, "eps_low", self.eps_low, "in (0, 1)")
        require(self.eps_high > 0, "eps_high", self.eps_high, "> 0")
        require(self.dual_clip is None or self.dual_clip > 1, "dual_clip", self.dual_clip, "> 1, or None")


@dataclass(frozen=True, kw_only=True)
class GroupOptions(Options, ABC):
    """Options of the methods whose advantage is the reward relative to its group."""

    advantages: ClassVar[tuple[str, ...]] = (*Options.advantages, "turn_reward")

    scale_rewards: Scale = "group"
    """What the distance from the group's mean is divided by: the deviation of the group, of the whole rollout
    batch, or nothing (TRL's option of this name)."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Several rewards: normalise their weighted sum, or each of them in its group and then the sum over the
    rollout batch (GDPO, arXiv 2601.05242), which reads `TokenBatch.rewards` in the place of `reward`."""
    reward_weights: Sequence[float] | None = None
    """Weights of the rewards where each is normalised; None: 1 each. With TRL, from its `reward_weights`."""

    def __post_init__(self) -> None:
        """Check the choices."""
        super().__post_init__()
        one_of("scale_rewards", self.scale_rewards, ("group", "batch", "none"))
        ways = ("sum_then_normalize", "normalize_then_sum")
        one_of("multi_objective_aggregation", self.multi_objective_aggregation, ways)
        if self.multi_objective_aggregation == "normalize_then_sum":
            one = "'outcome': normalize_then_sum compares each function's rewards, token_reward holds their sum"
            require(self.advantage == "outcome", "advantage", self.advantage, one)
            fixed = "at its default: normalize_then_sum divides by both deviations, and a group of one gets 0"
            for name in ("scale_rewards", "singleton"):
                value = getattr(self, name)
                require(value == getattr(type(self), name), name, value, fixed)
        else:
            alone = 'None: with "sum_then_normalize" the reward is a sum already'
            require(self.reward_weights is None, "reward_weights", self.reward_weights, alone)
        if self.reward_weights is not None:
            for weight in self.reward_weights:
                check_number("reward_weights", weight)
            object.__setattr__(self, "reward_weights", tuple(float(weight) for weight in self.reward_weights))

    def group_advantage(self) -> Stage[Tensor]:
        """The stage `advantage` of these options."""
        if self.multi_objective_aggregation == "normalize_then_sum":
            return Stage(decoupled_advantage, "rewards", "group", "mask", weights=self.reward_weights)
        rows, options = (self.earned, "group", "mask"), {"singleton": self.singleton, "scale": self.scale_rewards}
        if self.advantage == "turn_reward":
            return Stage(turn_advantage, *rows, "turn", **options)
        return Stage(group_advantage, *rows, **options)


EntropySource = Literal["current", "old"]


def entropy_from(source: EntropySource, current: When) -> tuple[str, When]:
    """The field of the record, and when a stage that reads it is made: at `current`, or at "prepare"."""
    return ("entropy", current) if source == "current" else ("old_entropy", "prepare")


def require(holds: bool, name: str, value: object, condition: str) -> None:
    """Raise a ValueError that names the option, its value and the condition, unless `holds`."""
    if not holds:
        raise ValueError(f"{name} must be {condition}, got {value!r}")


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless the value is one of the choices."""
    require(value in choices, name, value, "one of " + ", ".join(map(repr, choices)))


def pair(name: str, value: Any, condition: str) -> tuple[float, float]:
    """A pair of numbers, as it comes from Python, YAML or the command line."""
    require(isinstance(value, (tuple, list)) and len(value) == 2, name, value, condition)
    for x in value:
        check_number(name, x)
    return float(value[0]), float(value[1])


def check_number(name: str, value: Any) -> None:
    """Raise a ValueError unless the value is a number, and not NaN."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        hint = " (YAML takes 3e-4 for a word: write 3.0e-4)" if isinstance(value, str) else ""
        raise ValueError(f"{name} must be a number, got {value!r}{hint}")
    if math.isnan(value):
        raise ValueError(f"{name} is NaN")


def check_numbers(options: Any) -> None:
    """`check_number` on every option that is declared as one."""
    for f in fields(options):
        value = getattr(options, f.name)
        if str(f.type).removesuffix(" | None") in ("float", "int") and value is not None:
            check_number(f.name, value)


def check_names(what: str, given: Iterable[str], known: list[str]) -> None:
    """Raise a ValueError that has the nearest name, unless every given name is known."""
    for key in given:
        if key not in known:
            raise ValueError(f"{what} has no option {key!r}; {nearest(key, known)}")


def nearest(word: str, known: list[str]) -> str:
    """A hint: the known name nearest to the word, and all known names."""
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return hint + "known: " + ", ".join(sorted(known))
