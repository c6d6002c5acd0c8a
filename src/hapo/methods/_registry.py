"""The register of named methods: each is a dataclass of options that builds a `Method`."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

from ..method import Method


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    title: str
    arxiv: str
    year: int


@dataclass(frozen=True, kw_only=True)
class Options(ABC):
    """What every method can be told; each method adds its own.

    Raises:
        ValueError: a value is out of its range, named in the message.
    """

    paper: ClassVar[Paper]
    summary: ClassVar[str]
    stages: ClassVar[dict[str, str]]

    dual_clip: float | None = None
    """Cap c > 1 on the ratio of negative advantages; off in the papers (verl: always on, 3)."""
    kl_coef: float = 0.0
    """Weight of the k3 penalty towards a reference policy."""
    singleton: Literal["zero", "reward"] = "zero"
    """Advantage of a group of one: 0, or its reward (verl's convention)."""
    sampler_cap: float | None = 2.0
    """Cap of the importance weight min(exp(old - sampler), cap), used where the batch knows its sampler's
    log-probs; None switches the weight off."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{f.name} is NaN")
        require(self.dual_clip is None or self.dual_clip > 1, "dual_clip", self.dual_clip, "> 1, or None")
        require(self.kl_coef >= 0, "kl_coef", self.kl_coef, ">= 0")
        require(self.sampler_cap is None or self.sampler_cap > 0, "sampler_cap", self.sampler_cap, "> 0, or None")
        one_of("singleton", self.singleton, ("zero", "reward"))

    @abstractmethod
    def build(self) -> Method:
        """The method with these options."""


REGISTRY: dict[str, type[Options]] = {}

OptionsT = TypeVar("OptionsT", bound=type[Options])


def register(name: str) -> Callable[[OptionsT], OptionsT]:
    """Class decorator: make an options class known as `hapo.method(name)`."""

    def decorate(cls: OptionsT) -> OptionsT:
        REGISTRY[name] = cls
        return cls

    return decorate


def method(name: str, **options: Any) -> Method:
    """Build a named method, e.g. `hapo.method("hapo", eps_low=0.2, eps_high=0.28)`.

    Raises:
        ValueError: unknown method or option (the message has the nearest name), or a value out of range.
    """
    cls = options_of(name)
    known = [f.name for f in fields(cls)]
    for key in options:
        if key not in known:
            raise ValueError(f"method {name!r} has no option {key!r}; {_nearest(key, known)}")
    built = cls(**options)
    return replace(built.build(), options={"method": name, **asdict(built)})


def options_of(name: str) -> type[Options]:
    """The options class of a named method, with its defaults, summary and paper.

    Raises:
        ValueError: unknown method; the message has the nearest name.
    """
    if name not in REGISTRY:
        raise ValueError(f"there is no method {name!r}; {_nearest(name, list(REGISTRY))}")
    return REGISTRY[name]


def methods() -> list[str]:
    """Names of all methods."""
    return sorted(REGISTRY)


def require(holds: bool, name: str, value: object, condition: str) -> None:
    """Raise a ValueError that names the option, its value and the condition, unless `holds`."""
    if not holds:
        raise ValueError(f"{name} must be {condition}, got {value!r}")


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless the value is one of the choices."""
    require(value in choices, name, value, "one of " + ", ".join(map(repr, choices)))


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return hint + "known: " + ", ".join(sorted(known))
