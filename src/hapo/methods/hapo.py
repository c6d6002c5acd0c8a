"""HAPO: heterogeneous adaptive policy optimisation (arXiv 2509.16591)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..batch import EntropyStats
from ..method import Method
from ..parts.advantage import group_advantage, token_group_advantage
from ..parts.bounds import Bounds, asymmetric_bounds, constant_bounds
from ..parts.entropy import entropy_signal, entropy_stats
from ..parts.reduce import token_mean
from ..parts.shaping import redistribute
from ..parts.surrogate import clipped_surrogate
from ..stage import Stage
from ._options import EntropySource, Options, Paper, TemperatureOptions, entropy_from, one_of, require
from ._registry import register
from .dapo import DAPO


@register("hapo")
@dataclass(frozen=True, kw_only=True)
class HAPO(DAPO):
    """HAPO: the entropy of each token drives temperature, advantage, its redistribution and the clip bounds.

    With h in [-1, 1] the entropy signal of `parts.entropy` (eqs. 5-7):

    - A: T = T_base (1 + tau h), from the previous rollout's statistics (eq. 8);
    - B: advantage over all tokens of a group instead of over its responses (eq. 9);
    - C: A (1 + beta h) where r is outside [1 - e_L/2, 1 + e_R/2] and h > 0, or inside and h <= 0 (eqs. 10-11);
    - D: e_L (1 - alpha h) where h <= 0, e_R (1 + alpha h) where h > 0 (eqs. 12-13);

    then DAPO's loss. Constant for autograd: everything but the ratio in the surrogate. Statistics: rollout
    entropies, all valid tokens of the rollout batch, frozen.

    `variant="release"` computes what the authors' code does where it departs from the paper: the lower branch
    of h without its sign, an open neutral zone from the adapted bounds, a fall-back to the group advantage
    where |A| >= 5 (over valid tokens; the release counts padding too), dual clip 10, e_R 0.2, tau 0.05. It also
    takes statistics of current entropies in each micro-batch; here they are the rollout batch's (rule 1).
    """

    paper: ClassVar = Paper("Heterogeneous Adaptive Policy Optimization", "2509.16591", 2025)
    summary: ClassVar = "token entropy drives temperature, advantage, redistribution and clip bounds"
    advantages: ClassVar = Options.advantages  # its own advantage compares tokens

    components: str = "ABCD"
    """Which of the four parts are on, e.g. "AB"; "" is DAPO."""
    variant: Literal["paper", "release"] = "paper"
    """The paper's definitions, or what the authors' code computes."""
    rho: float = 0.8
    """Quantile of log entropy that is the pivot (paper)."""
    temperature: TemperatureOptions | Mapping[str, Any] | None = None
    """Component A: tau 0.1 (paper) or 0.05 (release), with rho and variant as here; keys: tau, rule, t_min,
    t_max."""
    alpha: float = 1.0
    """Strength of the clip adaptation (the paper has no symbol: 1)."""
    beta: float = 1.0
    """Strength of the redistribution (the paper has no symbol: 1)."""
    eps_high: float | None = None  # type: ignore[assignment]
    """Upper clip range: 0.28 (paper), 0.2 (release)."""
    dual_clip: float | None = None
    """Off (paper), 10 (release)."""
    fallback_threshold: float | None = None
    """|A| from which a group takes the group advantage: off (paper), 5 (release)."""
    entropy_source: EntropySource = "old"
    """Entropies that make the signal: at rollout, or of the current policy (release)."""

    def __post_init__(self) -> None:
        """Fill in what the variant decides, and check the ranges."""
        release = self.variant == "release"
        defaults: dict[str, tuple[float | None, float | None]] = {
            "eps_high": (0.28, 0.2),
            "dual_clip": (None, 10.0),
        }
        defaults["fallback_threshold"] = (None, 5.0)
        for name, pair in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, pair[release])
        one_of("variant", self.variant, ("paper", "release"))
        require(0 <= self.rho <= 1, "rho", self.rho, "in [0, 1]")
        if "A" in self.components:
            shared = {"tau": 0.05 if release else 0.1, "rho": self.rho, "variant": self.variant}
            rule = TemperatureOptions.of(self.temperature or {}, **shared)
            require(rule.rho == self.rho, "temperature rho", rule.rho, f"rho = {self.rho}: HAPO has one pivot")
            require(
                rule.variant == self.variant, "temperature variant", rule.variant, f"variant = {self.variant!r}"
            )
            object.__setattr__(self, "temperature", rule)
        else:
            require(self.temperature is None, "temperature", self.temperature, "None where component A is off")
        super().__post_init__()
        one_of("entropy_source", self.entropy_source, ("old", "current"))
        require(
            set(self.components) <= set("ABCD") and len(set(self.components)) == len(self.components),
            "components",
            self.components,
            'made of the letters A, B, C and D, each at most once, e.g. "AB"',
        )
        require(self.alpha >= 0, "alpha", self.alpha, ">= 0")
        if "D" in self.components:
            require(
                self.eps_low * (1 + self.alpha) < 1,
                "alpha",
                self.alpha,
                f"below {1 / self.eps_low - 1:g} so that "
                f"the widest lower bound eps_low (1 + alpha), eps_low = {self.eps_low}, leaves a ratio above 0",
            )
        require(0 <= self.beta <= 1, "beta", self.beta, "in [0, 1]: beyond, advantages change their sign")

    def build(self) -> Method:
        """The method with these options."""
        on = set(self.components)
        entropy, at = entropy_from(self.entropy_source, "loss")
        rows, clip = (self.earned, "group", "mask"), {"low": self.eps_low, "high": self.eps_high}
        group = Stage(group_advantage, *rows, singleton=self.singleton)
        over_tokens = {"singleton": self.singleton, "fallback_threshold": self.fallback_threshold}
        zone = Stage(redistribute, "advantage", "ratio", "signal", **clip, beta=self.beta)
        if self.variant == "release":
            zone = Stage(release_redistribute, "advantage", "ratio", "signal", "bounds", beta=self.beta)
        return Method(
            **self.shared(stats=Stage(entropy_stats, "old_entropy", "mask", rho=self.rho) if on else None),
            signal=Stage(bounded_signal, entropy, "stats", variant=self.variant) if on else None,
            signal_at=at if on & set("CD") else "prepare",
            advantage=Stage(token_group_advantage, *rows, **over_tokens) if "B" in on else group,
            bounds=(
                Stage(asymmetric_bounds, "signal", **clip, alpha=self.alpha)
                if "D" in on
                else Stage(constant_bounds, "ratio", **clip)
            ),
            shaping=zone if "C" in on else None,
            surrogate=Stage(clipped_surrogate, "ratio", "advantage", "bounds", dual_clip=self.dual_clip),
            penalty=self.kl(),
            reduce=token_mean,
        )


def bounded_signal(
    entropy: Float[Tensor, "B T"], stats: EntropyStats | None, variant: Literal["paper", "release"] = "paper"
) -> Float[Tensor, "B T"]:
    """`entropy_signal` within [-1, 1]; 0 where no token is valid, so that there are no statistics."""
    if stats is None:
        return torch.zeros_like(entropy)
    return entropy_signal(entropy, stats, variant).clamp_(-1.0, 1.0)


def release_redistribute(
    advantage: Float[Tensor, "B T"],
    ratio: Float[Tensor, "B T"],
    signal: Float[Tensor, "B T"],
    bounds: Bounds,
    beta: float = 1.0,
) -> Float[Tensor, "B T"]:
    """`redistribute` as the authors' code does: an open neutral zone from the adapted bounds."""
    return redistribute(advantage, ratio, signal, bounds.low, bounds.high, beta, closed=False)
