"""SENT: a penalty on certain tokens, the strongest where log-prob and advantage covary (arXiv 2512.04359)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..batch import masked
from ..method import Method
from ..parts.bounds import constant_bounds, no_bounds
from ..parts.penalty import ESTIMATORS, k1, k3, kl_penalty
from ..parts.reduce import sequence_mean, token_mean
from ..parts.select import smallest
from ..parts.surrogate import clipped_surrogate, unclipped_surrogate
from ..stage import Stage
from ._options import ClippedOptions, GroupOptions, Paper, one_of, require
from ._registry import register

KL_LIMIT = 10.0
"""Clamp of the estimate of a token's KL, without a gradient beyond (verl)."""
RELEASE_REF_KL = 0.001
"""Weight of the release's penalty towards the reference policy."""


@register("sent")
@dataclass(frozen=True, kw_only=True)
class SENT(GroupOptions, ClippedOptions):
    """SENT: the certain tokens of a step carry a KL penalty, those of largest covariance a stronger one.

    L = (1/S) sum_i (1/n_i) sum_t [ -min(r A, clip(r, 1 - eps, 1 + eps) A) + b D ]. b is 0 on the tokens of
    highest entropy, about a fifth of the step; kl_coef * low_factor on the others; and kl_coef * high_factor on
    those of the others whose covariance (logp - mean logp) (A - mean A) is largest. D estimates KL(policy ||
    reference). Constant for autograd: advantages, entropies, covariances and b. The paper's thresholds are not
    known; the shares are those of the authors' code.

    `variant="release"` computes what the authors' code means to: no clip, a token mean, |logp - old_logp| in the
    place of D, weak on the tokens of smallest covariance instead of all the others, and k3 to the reference on
    every token.

    Raises:
        ValueError: a share, a factor or a weight is out of its range.
    """

    paper: ClassVar = Paper(
        "Efficient Reinforcement Learning with Semantic and Token Entropy for LLM Reasoning", "2512.04359", 2025
    )
    summary: ClassVar = "KL on low-entropy tokens alone, stronger where log-prob and advantage covary most"

    kl_coef: float = 0.1
    """c, which the factors multiply to the two weights of the penalty (release, `ppo_kl_coef`)."""
    high_factor: float = 2.0
    """The weight on the tokens of largest covariance, over c (release); the paper's beta_high is 0.2 by it."""
    low_factor: float = 0.5
    """The weight on the other tokens of low entropy, over c (release); the paper's beta_low is 0.05 by it."""
    low_share: float = 0.8
    """Share of the step's tokens that count as of low entropy, rounded down (release)."""
    high_cov_ratio: float = 0.0002
    """Share of these that get the strong weight, rounded down, at least one (release, `kl_cov_ratio`)."""
    cov_mean: Literal["low", "all"] = "low"
    """Tokens over which the means in the covariance are taken: of low entropy (release), or all (the paper, in a
    transcription)."""
    kl_estimator: Literal["k1", "k3"] = "k3"
    """Estimate of the KL of a token (ours: the paper states none)."""
    ref_kl_coef: float | None = None
    """Weight of one more k3 to the reference, on every token; None: 0.001 in the release, else 0."""
    variant: Literal["paper", "release"] = "paper"
    """The paper's loss, or that of the authors' code, with a boolean mask."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        one_of("variant", self.variant, ("paper", "release"))
        one_of("cov_mean", self.cov_mean, ("low", "all"))
        one_of("kl_estimator", self.kl_estimator, ("k1", "k3"))
        require(0 < self.low_share <= 1, "low_share", self.low_share, "in (0, 1]")
        require(0 <= self.high_cov_ratio <= 1, "high_cov_ratio", self.high_cov_ratio, "in [0, 1]")
        require(self.low_factor >= 0, "low_factor", self.low_factor, ">= 0")
        least = f">= low_factor, which is {self.low_factor}"
        require(self.high_factor >= self.low_factor, "high_factor", self.high_factor, least)
        require(not self.unbiased_kl, "unbiased_kl", self.unbiased_kl, "False: SENT weighs its own penalty")
        require(self.ref_kl_coef is None or self.ref_kl_coef >= 0, "ref_kl_coef", self.ref_kl_coef, ">= 0")
        if self.variant == "release":
            fixed = "at its default: the release does not clip, and its penalty is |logp - old_logp|"
            for name in ("eps_low", "eps_high", "dual_clip", "kl_estimator"):
                require(getattr(self, name) == getattr(type(self), name), name, getattr(self, name), fixed)

    def build(self) -> Method:
        """The method with these options."""
        release, weighed = self.variant == "release", self.kl_coef > 0 and self.high_factor > 0
        ref_coef = RELEASE_REF_KL * release if self.ref_kl_coef is None else self.ref_kl_coef
        weights = {"low": self.kl_coef * self.low_factor, "high": self.kl_coef * self.high_factor}
        sets: dict[str, Any] = {"low_share": self.low_share, "high_cov_ratio": self.high_cov_ratio}
        choice = Stage(
            covariance_weights,
            *("logp", "entropy", "advantage", "mask"),
            **weights,
            **sets,
            cov_mean=self.cov_mean,
            ends=release,
        )
        bounds = Stage(constant_bounds, "ratio", low=self.eps_low, high=self.eps_high)
        clipped = Stage(clipped_surrogate, "ratio", "advantage", "bounds", dual_clip=self.dual_clip)
        return Method(
            **self.shared(),
            advantage=self.group_advantage(),
            signal=choice if weighed else None,
            signal_at="step",
            bounds=Stage(no_bounds, "ratio") if release else bounds,
            surrogate=Stage(unclipped_surrogate, "ratio", "advantage") if release else clipped,
            penalty=self._penalty(release, weighed, ref_coef),
            reduce=token_mean if release else sequence_mean,
        )

    def _penalty(self, release: bool, weighed: bool, ref_coef: float) -> Stage[Tensor] | None:
        """Of the tokens by their weights, the signal, and of every token by `ref_coef`; None without both."""
        if not weighed:
            return Stage(kl_penalty, "logp", "ref_logp", "mask", coef=ref_coef) if ref_coef else None
        if release:
            reads = ("signal", "logp", "old_logp", *(("ref_logp",) if ref_coef else ()))
            return Stage(distance_penalty, *reads, ref_coef=ref_coef)
        return Stage(weighted_kl, "signal", "logp", "ref_logp", estimator=self.kl_estimator, ref_coef=ref_coef)


def covariance_weights(
    logp: Float[Tensor, "B T"],
    entropy: Float[Tensor, "B T"],
    advantage: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    low: float,
    high: float,
    low_share: float = 0.8,
    high_cov_ratio: float = 0.0002,
    cov_mean: Literal["low", "all"] = "low",
    ends: bool = False,
) -> Float[Tensor, "B T"]:
    """The weight b of each token's penalty, a constant for autograd.

    Of the n valid tokens, the max(1, floor(low_share n)) of smallest entropy are T_low. Of these k, the
    max(1, floor(high_cov_ratio k)) of largest covariance (logp - mean) (A - mean) get `high`, the others `low`;
    tokens outside T_low get 0. The means are over T_low, or over all valid tokens. With `ends`, `low` goes to as
    many tokens of smallest covariance as `high` to the largest, over which it wins, and to no others (the authors'
    code).

    Equal tokens: of equal entropy, those of larger log-prob come first, then of larger advantage; of equal
    covariance, those of smaller entropy, larger log-prob and larger advantage. So the order of the rows decides
    only between tokens that are equal in all three.
    """
    n = int(mask.sum())
    x, h, a = (masked(one.detach(), mask).double() for one in (logp, entropy, advantage))
    certain = smallest(max(1, _floor(low_share * n)), (h, -x, -a), mask)
    over = certain if cov_mean == "low" else mask
    cov = _centred(x, over) * _centred(a, over)
    k = max(1, _floor(high_cov_ratio * int(certain.sum())))
    weight = torch.zeros_like(logp) if ends else low * certain.to(logp.dtype)
    weight = weight.masked_fill(smallest(k, (-cov, h, -x, -a), certain), high)
    return weight.masked_fill(smallest(k, (cov, h, -x, -a), certain), low) if ends else weight


def weighted_kl(
    weight: Float[Tensor, "B T"],
    logp: Float[Tensor, "B T"],
    ref_logp: Float[Tensor, "B T"],
    estimator: Literal["k1", "k3"] = "k3",
    ref_coef: float = 0.0,
) -> Float[Tensor, "B T"]:
    """weight times the estimate of KL(policy || reference), held to +-10; plus `ref_coef` times k3."""
    penalty = weight * ESTIMATORS[estimator](logp, ref_logp).clamp(-KL_LIMIT, KL_LIMIT)
    return penalty + ref_coef * k3(logp, ref_logp).clamp_max(KL_LIMIT) if ref_coef else penalty


def distance_penalty(
    weight: Float[Tensor, "B T"],
    logp: Float[Tensor, "B T"],
    old_logp: Float[Tensor, "B T"],
    ref_logp: Float[Tensor, "B T"] | None = None,
    ref_coef: float = 0.0,
) -> Float[Tensor, "B T"]:
    """weight |logp - old_logp|, of gradient 0 where both are equal; plus `ref_coef` times k3 to the reference."""
    penalty = weight * k1(logp, old_logp).abs()
    return penalty if ref_logp is None else penalty + ref_coef * k3(logp, ref_logp).clamp_max(KL_LIMIT)


def _floor(x: float) -> int:
    """Rounded down, an exact product as what it is."""
    return math.floor(x + 1e-9)


def _centred(x: Float[Tensor, "B T"], over: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """x less its mean over these tokens; 0 exactly where they are all equal, so that rounding decides nothing."""
    of = x[over]
    if not len(of) or bool((of == of[0]).all()):
        return torch.where(over, 0.0, x - of[:1].sum())
    return x - of.mean()
