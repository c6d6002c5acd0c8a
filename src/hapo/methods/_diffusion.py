"""Options of the methods whose log-probs come from a masked-diffusion language model."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass

from ._options import Options, require


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions(Options, ABC):
    """Options of methods with a `Likelihood`: no sampler's weight and no adaptive temperature.

    Both need the log-prob with which each token was drawn, and a diffusion model draws tokens in an order of its
    own, out of distributions that no pass sees again.

    Raises:
        ValueError: one of them is asked for, or a value is out of its range.
    """

    eps_low: float = 0.2
    """Lower clip range; 0 is allowed: every sequence that got worse where it should, or better, is clipped."""
    eps_high: float = 0.2
    """Upper clip range; 0 is allowed."""
    sampler_cap: float | None = None
    """None: the log-prob with which a diffusion model drew a token is not known."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(0 <= self.eps_low < 1, "eps_low", self.eps_low, "in [0, 1)")
        require(self.eps_high >= 0, "eps_high", self.eps_high, ">= 0")
        unknown = "the log-prob with which a diffusion model drew a token is not known"
        require(self.sampler_cap is None, "sampler_cap", self.sampler_cap, f"None: {unknown}")
        alone = "None: a diffusion model draws many tokens at once, and the rule is one of next-token entropies"
        require(self.temperature is None, "temperature", self.temperature, alone)
