"""The register of named methods: each is a dataclass of options that builds a `Method`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any, TypeVar

from ..method import Method
from ._options import Options, check_names, nearest

REGISTRY: dict[str, type[Options]] = {}

OptionsT = TypeVar("OptionsT", bound=type[Options])


def register(name: str) -> Callable[[OptionsT], OptionsT]:
    """Class decorator: make an options class known as `hapo.method(name)`."""

    def decorate(cls: OptionsT) -> OptionsT:
        cls.name = name
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
    for key in ("tau", "rule", "t_min", "t_max"):
        if key in options and key not in known:
            raise ValueError(f"{key} belongs to the temperature: temperature={{{key!r}: {options[key]!r}}}")
    check_names(f"method {name!r}", options, known)
    built = cls(**options)
    return built.build().replace(options={"method": name, **asdict(built)})


def options_of(name: str) -> type[Options]:
    """The options class of a named method, with its defaults, summary and paper.

    Raises:
        ValueError: unknown method; the message has the nearest name.
    """
    if name not in REGISTRY:
        raise ValueError(f"there is no method {name!r}; {nearest(name, list(REGISTRY))}")
    return REGISTRY[name]


def methods() -> list[str]:
    """Names of all methods."""
    return sorted(REGISTRY)
