"""EGSPO: entropy-gated selective policy optimisation (arXiv 2602.03309)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..method import Method
from ..parts.bounds import constant_bounds
from ..parts.reduce import token_mean
from ..parts.select import largest_share
from ..parts.surrogate import clipped_surrogate
from ..stage import Stage
from ._options import ClippedOptions, GroupOptions, Paper, one_of, require
from ._registry import register
from .chord_phi import undecided


@register("egspo")
@dataclass(frozen=True, kw_only=True)
class EGSPO(GroupOptions, ClippedOptions):
    """EGSPO: uncertain tokens learn in full, certain ones phi times as much, in right and wrong responses alike.

    L = -(1/N) sum_it w min(r A, clip(r, 1 - eps, 1 + eps) A), w = g + (1 - g) phi: g = 1 on the max(1, floor(rho
    N)) tokens of the rollout batch with the highest entropy at rollout, or where that entropy is at least tau;
    phi = p (1 - p), p = exp(logp), or a constant. Constant for autograd: advantages, g, phi.

    Only abstract and introduction of the paper could be read: the two branches are the paper's, threshold, phi,
    advantage and reduction are reconstructed. No code of the authors is public. Another EGSPO is a method for
    diffusion language models.
    """

    paper: ClassVar = Paper(
        "Entropy-Gated Selective Policy Optimization: Token-Level Gradient Allocation for Hybrid Training of "
        "Large Language Models",
        "2602.03309",
        2026,
    )
    summary: ClassVar = "the fifth of the tokens with the highest entropy learns in full, the others attenuated"

    rho: float = 0.2
    """Share of the tokens of the rollout batch that learn in full (reconstructed)."""
    ties: Literal["all", "first"] = "all"
    """Which tokens that tie with the last of that share learn in full: all, whatever the order of the rows (ours),
    or the first ones of the batch, so that the number is exact (reconstructed)."""
    tau: float | None = None
    """Entropy from which a token learns in full, nats, in the place of `rho`; None: the share decides."""
    attenuation: Literal["chord_phi", "const"] = "chord_phi"
    """Factor of the other tokens: CHORD-phi's p (1 - p) of the current policy, or `phi_const` (reconstructed)."""
    phi_const: float = 0.1
    """The constant factor (reconstructed): 0 silences certain tokens, 1 is the plain clipped loss."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(0 < self.rho <= 1, "rho", self.rho, "in (0, 1]")
        one_of("ties", self.ties, ("all", "first"))
        require(self.tau is None or self.tau >= 0, "tau", self.tau, ">= 0, in nats, or None")
        one_of("attenuation", self.attenuation, ("chord_phi", "const"))
        require(0 <= self.phi_const <= 1, "phi_const", self.phi_const, "in [0, 1]")

    def build(self) -> Method:
        """The method with these options."""
        share = Stage(largest_share, "old_entropy", "mask", rho=self.rho, ties=self.ties)
        level = Stage(at_least, "old_entropy", "mask", tau=self.tau)
        by_token = self.attenuation == "chord_phi"
        factor = {} if by_token else {"phi": self.phi_const}
        return Method(
            **self.shared(),
            signal=share if self.tau is None else level,
            advantage=self.group_advantage(),
            bounds=Stage(constant_bounds, "ratio", low=self.eps_low, high=self.eps_high),
            # w >= 0 goes through the minimum, so that it may stand on the advantage.
            shaping=Stage(attenuated, "advantage", "signal", "logp", **factor),
            surrogate=Stage(clipped_surrogate, "ratio", "advantage", "bounds", dual_clip=self.dual_clip),
            penalty=self.kl(),
            reduce=token_mean,
            # The gradient is that of a loss whose phi stands still.
            breaks=frozenset({"detach"} if by_token else ()),
        )


def at_least(entropy: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], tau: float) -> Float[Tensor, "B T"]:
    """1 at the valid tokens whose entropy is tau nats or more, 0 elsewhere."""
    return (mask & (entropy >= tau)).to(entropy.dtype)


def attenuated(
    advantage: Float[Tensor, "B T"],
    gate: Float[Tensor, "B T"],
    logp: Float[Tensor, "B T"],
    phi: float | None = None,
) -> Float[Tensor, "B T"]:
    """A at the tokens whose gate is 1, phi A at those whose gate is 0; phi: p (1 - p) where none is given."""
    # Rounding may leave log p a little above 0, and phi must not turn a push round.
    factor = undecided(logp.detach().clamp_max(0.0)) if phi is None else phi
    return torch.where(gate > 0, advantage, factor * advantage)
