"""A temperature rule with the statistics that it reads, in the form that every sampler takes.

Engines hand parameters to a request as flat scalars, so a rule is a flat mapping of scalars too; a JSON file of it
(`hapo calibrate` writes one) serves transformers, vLLM and SGLang alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..batch import EntropyStats
from ..kernels import use_triton
from ..method import Method
from ..methods._options import TemperatureOptions, check_names, check_number, one_of, require
from ..outputs import write_whole
from ..parts.entropy import CHUNK, entropy_from_logits
from .decoding_rules import EDT, DynamicTemperature

PREFIX = "hapo_"
"""Begins the name of every parameter of a request; all others are left to the engine."""

AnyRule = TemperatureOptions | DynamicTemperature | EDT
RULES: dict[str, type[AnyRule]] = {
    "bounded": TemperatureOptions,
    "zscore": TemperatureOptions,
    "dynatemp": DynamicTemperature,
    "edt": EDT,
}
STATS = ("pivot", "sigma", "h_max", "h_min")


@dataclass(frozen=True)
class TemperatureRule:
    """T = T_base x factor(H), H the entropy of softmax(logits / T_base), nats (HAPO, arXiv 2509.16591, eq. 8).

    Raises:
        ValueError: the rule reads statistics and there are none.
    """

    options: AnyRule
    """Which rule it is, with its options."""
    stats: EntropyStats | None = None
    """Of the previous rollout, or of a calibration; None where the rule reads none."""

    def __post_init__(self) -> None:
        """Check that the rule has what it reads."""
        if self.options.needs_stats and self.stats is None:
            raise ValueError(
                f"the rule {self.options.rule!r} reads statistics ({', '.join(STATS)}), and there are none: "
                "calibrate, or leave the rule out to sample at T_base"
            )

    def factor(self, entropy: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Factor on T_base at positions with these entropies, nats; > 0."""
        return self.options.factor(entropy, self.stats)  # type: ignore[arg-type]  # __post_init__ saw to it

    def to_args(self) -> dict[str, float | str]:
        """Flat parameters of a request: `SamplingParams.extra_args`, `vllm_xargs`, SGLang's `custom_params`."""
        options = {k: v for k, v in asdict(self.options).items() if v is not None}
        stats = {} if self.stats is None else {k: v for k, v in self.stats.to_dict().items() if k in STATS}
        return {PREFIX + k: v for k, v in {**options, **stats}.items()}

    @classmethod
    def from_args(cls, args: Mapping[str, Any] | None) -> TemperatureRule | None:
        """The rule that a request's parameters describe; None where none of them is ours: T_base.

        Raises:
            ValueError: an unknown parameter, a value of the wrong kind or out of its range, or statistics missing.
        """
        given = {k.removeprefix(PREFIX): v for k, v in (args or {}).items() if k.startswith(PREFIX)}
        if not given:
            return None
        rule = rule_options({k: v for k, v in given.items() if k not in STATS})
        found = {k: v for k, v in given.items() if k in STATS}
        if not found:
            return cls(rule)
        for name in STATS:
            if name not in found:
                raise ValueError(
                    f"{PREFIX}{name} is missing: statistics are {', '.join(PREFIX + s for s in STATS)}"
                )
            check_number(PREFIX + name, found[name])
            require(abs(found[name]) < float("inf"), PREFIX + name, found[name], "finite")
        require(found["sigma"] >= 0, PREFIX + "sigma", found["sigma"], ">= 0")
        require(found["h_max"] >= 0, PREFIX + "h_max", found["h_max"], ">= 0")
        require(found["h_min"] <= 0, PREFIX + "h_min", found["h_min"], "<= 0")
        return cls(rule, EntropyStats(**found))

    def save(self, path: str | Path) -> None:
        """Write the rule as JSON, in one piece: the parameters of `to_args`."""
        write_whole(Path(path), json.dumps(self.to_args(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> TemperatureRule:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds no rule.
        """
        try:
            args = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON ({error}); `hapo calibrate` writes such a file") from error
        rule = cls.from_args(args if isinstance(args, dict) else None)
        if rule is None:
            raise ValueError(
                f"{path} holds no parameter that begins with {PREFIX!r}; `hapo calibrate` writes them"
            )
        return rule


def rule_options(options: Mapping[str, Any]) -> AnyRule:
    """The rule that these options describe; the key "rule" names it.

    Raises:
        ValueError: unknown rule or option, or a value of the wrong kind or out of its range.
    """
    name = options.get("rule", "bounded")
    one_of("rule", name, tuple(RULES))
    kind = RULES[name]
    check_names(f"the rule {name!r}", options, [*(f.name for f in fields(kind)), *STATS])
    return kind(**options)


HARMLESS = TemperatureRule(EDT(theta=0.0))
"""A rule that changes nothing, to ask an engine with."""


def temperature_of(method: Method) -> TemperatureOptions | None:
    """The rule that the options of a named method describe, which a request can carry; None for any other."""
    options = method.options.get("temperature")
    if options is None or "temperature_rule" in method.options.get("replaced", ()):
        return None
    return TemperatureOptions.of(options)


def rule_of(method: Method, stats: EntropyStats | None) -> TemperatureRule | None:
    """The method's rule with these statistics; None where it would not act, or has none yet: T_base."""
    rule = temperature_of(method)
    return TemperatureRule(rule, stats) if rule is not None and rule.acts and stats is not None else None


def temper_(
    logits: Float[Tensor, "N V"],
    rule: TemperatureRule,
    t_base: Float[Tensor, " N"],
    rows: Int[Tensor, " n"] | None,
) -> None:
    """Divide these rows of the logits by factor(H) in place, with H the entropy of softmax(logits / T_base).

    The engine divides by T_base later, so that the token is drawn at T_base x factor(H). `rows` None: all of them.
    On CUDA HAPO_TRITON=1 takes a Triton kernel (`hapo.kernels`).
    """
    if use_triton(logits):
        from ..kernels import temperature

        temperature.temper_(logits, rule.factor, t_base, rows)
    elif rows is None:
        logits.div_(rule.factor(entropy_from_logits(logits, t_base)).unsqueeze(1))
    else:
        # A few rows at a time: one copy of all chosen rows would cost more than their entropy.
        parts = rows.split(max(1, CHUNK // logits.shape[1]))
        entropy = [entropy_from_logits(logits[part], t_base[part]) for part in parts]
        for row, factor in zip(rows.tolist(), rule.factor(torch.cat(entropy)), strict=True):
            logits[row].div_(factor)
