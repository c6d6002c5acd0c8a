"""diffu-GRPO: GRPO with token log-probs from one masked pass of a diffusion model (d1, arXiv 2504.12216)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..method import Method
from ..parts.advantage import group_advantage
from ..parts.bounds import constant_bounds
from ..parts.elbo import MaskedPass
from ..parts.ratio import token_ratio
from ..parts.reduce import sequence_mean, token_mean
from ..parts.surrogate import clipped_surrogate
from ..stage import Stage
from ._diffusion import DiffusionOptions
from ._options import Paper, one_of, require
from ._registry import register


@register("diffu_grpo")
@dataclass(frozen=True, kw_only=True)
class DiffuGRPO(DiffusionOptions):
    """diffu-GRPO: a ratio per token, of log-probs of a masked-diffusion model to which the response is hidden.

    L = (1/S) sum_i (1/n_i) sum_t [ -min(r A_i, clip(r, 1 - eps_low, 1 + eps_high) A_i) + beta k3 ], A_i = R_i -
    mean, r = exp(logp - old_logp), beta = `kl_coef`. logp is log p(y_t | prompt with a share of it hidden), the
    same share in all policies that are compared. Constant for autograd: advantages. An unclipped token has the
    gradient (-A_i r + beta (1 - exp(ref_logp - logp))) / (S n_i).
    """

    paper: ClassVar = Paper(
        "d1: Scaling Reasoning in Diffusion Large Language Models via Reinforcement Learning", "2504.12216", 2025
    )
    summary: ClassVar = "diffusion models: GRPO's token ratios from one pass with the response hidden"

    eps_low: float = 0.5
    """Lower clip range (the authors' configuration)."""
    eps_high: float = 0.5
    """Upper clip range (the authors' configuration)."""
    kl_coef: float = 0.04
    """Weight of the k3 penalty (the authors' configuration)."""
    prompt_rate: float = 0.15
    """Probability with which a token of the prompt is hidden (paper)."""
    variant: Literal["paper", "release"] = "paper"
    """Mean over responses of the means over their tokens, or one mean over all tokens (the authors' code)."""

    def __post_init__(self) -> None:
        """Check the choices."""
        super().__post_init__()
        require(0 <= self.prompt_rate < 1, "prompt_rate", self.prompt_rate, "in [0, 1)")
        one_of("variant", self.variant, ("paper", "release"))

    def build(self) -> Method:
        """The method with these options."""
        return Method(
            **self.shared(),
            likelihood=MaskedPass(self.prompt_rate),
            advantage=Stage(group_advantage, self.earned, "group", "mask", singleton=self.singleton, scale="none"),
            ratio=Stage(token_ratio, "logp", "old_logp"),
            bounds=Stage(constant_bounds, "ratio", low=self.eps_low, high=self.eps_high),
            surrogate=Stage(clipped_surrogate, "ratio", "advantage", "bounds"),
            penalty=self.kl(),
            reduce=sequence_mean if self.variant == "paper" else token_mean,
        )
