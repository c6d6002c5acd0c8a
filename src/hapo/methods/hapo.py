"""HAPO: heterogeneous adaptive policy optimisation (arXiv 2509.16591)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from ..batch import EntropyStats, TokenBatch
from ..method import Method
from ..parts.advantage import token_group_advantage
from ..parts.bounds import Bounds, asymmetric_bounds
from ..parts.entropy import entropy_signal, entropy_stats
from ..parts.shaping import redistribute
from ..parts.temperature import bounded_factor, zscore_factor
from ._registry import Paper, one_of, register, require
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
    where |A| >= 5 (over valid tokens; the release counts padding too), dual clip 10, e_R 0.2, tau 0.05. Its
    micro-batch statistics of current entropies are `stats_scope="micro_batch", entropy_source="current"`.
    """

    paper: ClassVar = Paper("Heterogeneous Adaptive Policy Optimization", "2509.16591", 2025)
    summary: ClassVar = "token entropy drives temperature, advantage, redistribution and clip bounds"
    stages: ClassVar = {
        "temperature": "T_base (1 + tau h)",
        "filter": "mixed groups",
        "advantage": "token-level group z-score",
        "signal": "signed log-entropy rank h",
        "reshape": "A (1 + beta h) by entropy and ratio",
        "bounds": "widened by h, one side a token",
        "surrogate": "clipped",
        "reduce": "token mean",
    }

    components: str = "ABCD"
    """Which of the four parts are on, e.g. "AB"; "" is DAPO."""
    variant: Literal["paper", "release"] = "paper"
    """The paper's definitions, or what the authors' code computes."""
    rho: float = 0.8
    """Quantile of log entropy that is the pivot (paper)."""
    tau: float | None = None
    """Strength of the temperature law: 0.1 (paper), 0.05 (release)."""
    law: Literal["bounded", "zscore"] = "bounded"
    """Temperature law: 1 + tau clip(h, -1, 1), or the paper's eq. 8 clamped to [t_min, t_max]."""
    t_min: float = 0.1
    """Lower clamp of the z-score law, as a factor on T_base (ours; the paper states none)."""
    t_max: float = 2.0
    """Upper clamp of the z-score law, as a factor on T_base (ours)."""
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
    entropy_source: Literal["old", "current"] = "old"
    """Entropies that make the signal: at rollout, or of the current policy (release)."""
    stats_scope: Literal["batch", "micro_batch"] = "batch"
    """What the statistics are taken over; "micro_batch" (release) makes the gradient depend on the split."""

    def __post_init__(self) -> None:
        """Fill in what the variant decides, and check the ranges."""
        release = self.variant == "release"
        defaults = {"tau": (0.1, 0.05), "eps_high": (0.28, 0.2), "dual_clip": (None, 10.0)}
        defaults["fallback_threshold"] = (None, 5.0)
        for name, pair in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, pair[release])
        super().__post_init__()
        one_of("variant", self.variant, ("paper", "release"))
        one_of("law", self.law, ("bounded", "zscore"))
        one_of("entropy_source", self.entropy_source, ("old", "current"))
        one_of("stats_scope", self.stats_scope, ("batch", "micro_batch"))
        require(
            set(self.components) <= set("ABCD") and len(set(self.components)) == len(self.components),
            "components",
            self.components,
            'made of the letters A, B, C and D, each at most once, e.g. "AB"',
        )
        require(0 <= self.rho <= 1, "rho", self.rho, "in [0, 1]")
        assert self.tau is not None
        safe = "in [0, 1): from 1 on, the temperature 1 + tau h of the most certain token is 0 or negative"
        if self.law == "bounded":
            require(0 <= self.tau < 1, "tau", self.tau, safe)
        require(self.tau >= 0, "tau", self.tau, ">= 0")
        require(0 < self.t_min <= 1, "t_min", self.t_min, "in (0, 1]: a temperature must stay positive")
        require(self.t_max >= 1, "t_max", self.t_max, ">= 1")
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
        base = replace(super().build(), name="hapo")
        on = set(self.components)
        changes: dict[str, object] = {}
        if on:
            changes["signal"] = self._signal
        if on & set("CD") and (self.entropy_source, self.stats_scope) != ("old", "batch"):
            changes["live_signal"] = self._live_signal
        if "A" in on and self.tau:
            changes["factor"] = self._factor
        if "B" in on:
            changes["advantage"] = self._advantage
        if "C" in on:
            changes["reshape"] = self._redistribute
        if "D" in on:
            changes["bounds"] = self._bounds
        return replace(base, **changes)  # type: ignore[arg-type]

    def _signal(self, batch: TokenBatch) -> tuple[Tensor, EntropyStats | None]:
        assert batch.old_entropy is not None
        stats = entropy_stats(batch.old_entropy, batch.mask, self.rho)
        if stats is None:
            return batch.old_entropy.new_zeros(batch.mask.shape), None
        return entropy_signal(batch.old_entropy, stats, self.variant), stats

    def _live_signal(self, batch: TokenBatch) -> Tensor:
        entropy = batch.old_entropy if self.entropy_source == "old" else batch.entropy
        if entropy is None:
            raise ValueError('entropy_source="current" needs TokenBatch.entropy, the current policy\'s entropies')
        stats = batch.stats
        if self.stats_scope == "micro_batch":
            stats = entropy_stats(entropy, batch.mask, self.rho)
        if stats is None:
            return entropy.new_zeros(batch.mask.shape)
        return entropy_signal(entropy, stats, self.variant).clamp(-1.0, 1.0)

    def _factor(self, entropy: Tensor, stats: EntropyStats) -> Tensor:
        assert self.tau is not None
        if self.law == "zscore":
            return zscore_factor(entropy, stats, self.tau, self.t_min, self.t_max)
        return bounded_factor(entropy, stats, self.tau, self.variant)

    def _advantage(self, batch: TokenBatch) -> Tensor:
        return token_group_advantage(
            batch.reward,
            batch.group,
            batch.mask,
            singleton=self.singleton,
            fallback_threshold=self.fallback_threshold,
        )

    def _redistribute(self, advantage: Tensor, ratio: Tensor, signal: Tensor | None, bounds: Bounds) -> Tensor:
        assert signal is not None and self.eps_high is not None
        low: Tensor | float = self.eps_low
        high: Tensor | float = self.eps_high
        if self.variant == "release":
            low, high = bounds
        return redistribute(advantage, ratio, signal, low, high, self.beta, closed=self.variant == "paper")

    def _bounds(self, ratio: Tensor, signal: Tensor | None) -> Bounds:
        assert signal is not None and self.eps_high is not None
        return asymmetric_bounds(signal, self.eps_low, self.eps_high, self.alpha)
