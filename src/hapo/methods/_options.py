"""Options that methods share, and what they build of them. A method's own file adds the rest."""

from __future__ import annotations

import difflib
import math
from abc import ABC
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..batch import EntropyStats, TokenBatch
from ..method import Method
from ..parts.advantage import group_advantage
from ..parts.bounds import Bounds, constant_bounds
from ..parts.entropy import entropy_stats
from ..parts.surrogate import clipped_surrogate
from ..parts.temperature import bounded_factor, dynatemp_factor, edt_factor, zscore_factor


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    title: str
    arxiv: str
    year: int


@dataclass(frozen=True, kw_only=True)
class AdaptiveTemperature:
    """HAPO's sampling temperature (arXiv 2509.16591, eq. 8): T = T_base (1 + tau h), h the entropy signal.

    It is orthogonal to the loss, so every method takes it: `temperature={"tau": 0.1}`. `law` names others.

    Raises:
        ValueError: a value is out of its range, named in the message.
    """

    tau: float = 0.1
    """Strength (paper)."""
    law: Literal["bounded", "zscore", "dynatemp", "edt"] = "bounded"
    """1 + tau clip(h, -1, 1); the paper's eq. 8 with its z-score, clamped to [t_min, t_max]; or a rule without
    statistics, llama.cpp's dynamic temperature (1 - tau to 1 + tau) or EDT (0.8^(theta / H))."""
    rho: float = 0.8
    """Quantile of log entropy that is the pivot (paper)."""
    t_min: float = 0.1
    """Lower clamp of the z-score law and of EDT, as a factor on T_base (ours; the papers state none)."""
    t_max: float = 2.0
    """Upper clamp of the z-score law, as a factor on T_base (ours)."""
    variant: Literal["paper", "release"] = "paper"
    """Sign of the lower branch of h: the paper's, or as the authors' code computes it."""
    exponent: float = 1.0
    """Power of the normalised entropy in "dynatemp"."""
    vocabulary: int | None = None
    """Number of tokens, which "dynatemp" normalises by."""
    theta: float = 0.1
    """Strength of "edt", nats."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_numbers(self)
        one_of("law", self.law, ("bounded", "zscore", "dynatemp", "edt"))
        one_of("variant", self.variant, ("paper", "release"))
        if self.law == "dynatemp":
            fits = isinstance(self.vocabulary, int) and self.vocabulary > 1
            require(fits, "vocabulary", self.vocabulary, "a whole number > 1 with the law 'dynatemp'")
        require(0 < self.exponent < math.inf, "exponent", self.exponent, "> 0 and finite")
        require(0 <= self.theta < math.inf, "theta", self.theta, ">= 0 and finite")
        if self.law in ("bounded", "dynatemp"):
            safe = "in [0, 1): from 1 on, the temperature 1 + tau h of the most certain token is 0 or negative"
            require(0 <= self.tau < 1, "tau", self.tau, safe)
        require(0 <= self.tau < math.inf, "tau", self.tau, ">= 0 and finite")
        require(0 <= self.rho <= 1, "rho", self.rho, "in [0, 1]")
        require(0 < self.t_min <= 1, "t_min", self.t_min, "in (0, 1]: a temperature must stay positive")
        require(1 <= self.t_max < math.inf, "t_max", self.t_max, ">= 1 and finite")

    @classmethod
    def of(cls, value: AdaptiveTemperature | Mapping[str, Any], **defaults: Any) -> AdaptiveTemperature:
        """The law that a mapping of its options describes, as it comes from YAML or the command line."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f'temperature must be a mapping such as {{"tau": 0.1}}, or None, got {value!r}')
        check_names("temperature", value, [f.name for f in fields(cls)])
        return cls(**{**defaults, **value})

    @property
    def acts(self) -> bool:
        """Whether any temperature differs from T_base."""
        return (self.theta if self.law == "edt" else self.tau) > 0

    @property
    def needs_stats(self) -> bool:
        """Whether the law reads statistics of a rollout or of a calibration."""
        return self.law in ("bounded", "zscore")

    def factor(self, entropy: Tensor, stats: EntropyStats | None) -> Tensor:
        """Factor on T_base at positions with these entropies (nats, of softmax(logits / T_base))."""
        if self.law == "dynatemp":
            assert self.vocabulary is not None
            return dynatemp_factor(entropy, self.vocabulary, self.tau, self.exponent)
        if self.law == "edt":
            return edt_factor(entropy, self.theta, low=self.t_min)
        assert stats is not None
        if self.law == "zscore":
            return zscore_factor(entropy, stats, self.tau, self.t_min, self.t_max)
        return bounded_factor(entropy, stats, self.tau, self.variant)


@dataclass(frozen=True, kw_only=True)
class Options(ABC):
    """What every method can be told; each method adds its own.

    Raises:
        ValueError: a value is out of its range, named in the message.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper]
    summary: ClassVar[str]
    stages: ClassVar[dict[str, str]]

    filter_groups: bool = False
    """Drop groups whose verdicts are all equal (DAPO's dynamic sampling)."""
    singleton: Literal["zero", "reward"] = "zero"
    """Advantage of a group of one: 0, or its reward (verl's; over 1 + 1e-6 where a deviation divides)."""
    kl_coef: float = 0.0
    """Weight of the k3 penalty towards a reference policy."""
    sampler_cap: float | None = 2.0
    """Cap of the importance weight min(exp(old - sampler), cap), used where the batch knows its sampler's
    log-probs; None switches the weight off."""
    temperature: AdaptiveTemperature | Mapping[str, Any] | None = None
    """HAPO's adaptive sampling temperature, e.g. {"tau": 0.1}; its keys: tau, law, rho, t_min, t_max, variant,
    exponent, vocabulary, theta."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_numbers(self)
        require(self.kl_coef >= 0, "kl_coef", self.kl_coef, ">= 0")
        require(self.sampler_cap is None or self.sampler_cap > 0, "sampler_cap", self.sampler_cap, "> 0, or None")
        one_of("singleton", self.singleton, ("zero", "reward"))
        if self.temperature is not None:
            object.__setattr__(self, "temperature", AdaptiveTemperature.of(self.temperature))

    def build(self) -> Method:
        """The method with these options: here the group's z-score and Method's own choices for the loss."""
        method = Method(
            name=self.name,
            advantage=self._advantage,
            filter_groups=self.filter_groups,
            sampler_cap=self.sampler_cap,
            kl_coef=self.kl_coef,
        )
        if self.temperature is None:
            return method
        assert isinstance(self.temperature, AdaptiveTemperature)
        return method.replace(stats=self._stats, factor=self.temperature.factor if self.temperature.acts else None)

    def _advantage(self, batch: TokenBatch) -> Tensor:
        return group_advantage(batch.reward, batch.group, batch.mask, singleton=self.singleton)

    def _stats(self, batch: TokenBatch) -> EntropyStats | None:
        assert batch.old_entropy is not None and isinstance(self.temperature, AdaptiveTemperature)
        return entropy_stats(batch.old_entropy, batch.mask, self.temperature.rho)


@dataclass(frozen=True, kw_only=True)
class ClippedOptions(Options):
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

    def build(self) -> Method:
        """The clipped surrogate between constant bounds."""
        surrogate = partial(clipped_surrogate, dual_clip=self.dual_clip)
        return super().build().replace(bounds=self._bounds, surrogate=surrogate)

    def _bounds(self, ratio: Tensor, signal: Tensor | None) -> Bounds:
        return constant_bounds(ratio, self.eps_low, self.eps_high)


EntropySource = Literal["current", "old"]


def entropy_of(batch: TokenBatch, source: EntropySource) -> Tensor:
    """The current policy's entropies, or those at rollout, detached.

    Raises:
        ValueError: the batch has none.
    """
    name = "entropy" if source == "current" else "old_entropy"
    entropy: Tensor | None = getattr(batch, name)
    if entropy is None:
        raise ValueError(
            f'entropy_source="{source}" reads TokenBatch.{name} (nats), and it is missing: take it in the same '
            f"pass as {'logp' if source == 'current' else 'old_logp'}"
        )
    return entropy.detach()


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
