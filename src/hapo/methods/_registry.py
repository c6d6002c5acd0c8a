"""The register of named methods: each is a dataclass of options that builds a `Method` or a `Supervised`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any, Literal, TypeVar, overload

from ..companions import COMPANIONS
from ..method import Method
from ..supervised import Supervised
from ._options import Kind, MethodOptions, Options, SupervisedOptions, check_names, nearest

REGISTRY: dict[str, type[MethodOptions]] = {}

OptionsT = TypeVar("OptionsT", bound=type[MethodOptions])

SupervisedName = Literal["chord_phi", "dft", "ranktuner", "sft"]
"""Names of which `method` says that they are supervised; for type checkers alone."""

TRAINED_BY = {
    "policy": "it learns from rollouts and their rewards, in HAPOTrainer or verl",
    "supervised": "it learns from demonstrations, in hapo.trl.SupervisedTrainer",
}
"""Kind -> what a user who named such a method in another place is told."""


def register(name: str) -> Callable[[OptionsT], OptionsT]:
    """Class decorator: make an options class known as `hapo.method(name)`."""

    def decorate(cls: OptionsT) -> OptionsT:
        cls.name = name
        REGISTRY[name] = cls
        return cls

    return decorate


@overload
def method(name: SupervisedName, **options: Any) -> Supervised: ...
@overload
def method(name: str, **options: Any) -> Method: ...
def method(name: str, **options: Any) -> Method | Supervised:
    """Build a named method, e.g. `hapo.method("hapo", eps_low=0.2, eps_high=0.28)`, of either kind.

    Raises:
        ValueError: unknown method or option (the message has the nearest name), or a value out of range.
    """
    cls = options_of(name)
    known = [f.name for f in fields(cls)]
    for key in ("tau", "rule", "t_min", "t_max"):
        if key in options and key not in known and "temperature" in known:
            raise ValueError(f"{key} belongs to the temperature: temperature={{{key!r}: {options[key]!r}}}")
    check_names(f"method {name!r}", options, known)
    built = cls(**options)
    return built.build().replace(options={"method": name, **asdict(built)})


def policy(name: str, **options: Any) -> Method:
    """`method`, for what needs rollouts.

    Raises:
        ValueError: as `method` does; and the method is of another kind.
    """
    options_of(name, "policy")
    return method(name, **options)


def supervised(name: str, **options: Any) -> Supervised:
    """`method`, for what needs demonstrations.

    Raises:
        ValueError: as `method` does; and the method is of another kind.
    """
    options_of(name, "supervised")
    built: Any = method(name, **options)
    return built


@overload
def options_of(name: str, kind: Literal["policy"]) -> type[Options]: ...
@overload
def options_of(name: str, kind: Literal["supervised"]) -> type[SupervisedOptions]: ...
@overload
def options_of(name: str, kind: None = None) -> type[MethodOptions]: ...
def options_of(name: str, kind: Kind | None = None) -> Any:
    """The options class of a named method, with its defaults, summary and paper.

    Raises:
        ValueError: unknown method (the message has the nearest name), or one of another kind than asked for.
    """
    known = methods(kind)
    if name in COMPANIONS:
        raise ValueError(f"{name!r} is no method but an {COMPANIONS[name].kind}: {COMPANIONS[name].use}")
    if name not in REGISTRY:
        raise ValueError(f"there is no method {name!r}; {nearest(name, list(known))}")
    if name not in known:
        of = REGISTRY[name].kind
        raise ValueError(f"method {name!r} is a {of} method: {TRAINED_BY[of]}. {kind} methods: {', '.join(known)}")
    return REGISTRY[name]


def methods(kind: Kind | None = None) -> dict[str, Kind]:
    """Name of each method -> its kind, "policy" or "supervised"; those of one kind where it is given."""
    return {name: cls.kind for name, cls in sorted(REGISTRY.items()) if kind in (None, cls.kind)}
