"""SFT: supervised fine-tuning (as in InstructGPT, arXiv 2203.02155)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..supervised import Supervised
from ._options import Paper, SupervisedOptions
from ._registry import register


@register("sft")
@dataclass(frozen=True, kw_only=True)
class SFT(SupervisedOptions):
    """SFT: the mean negative log-likelihood of the targets; the other supervised methods weigh its tokens.

    L = -sum_t m logp / N, N the valid targets of the optimiser step. TRL's "nll" computes the same.
    """

    paper: ClassVar = Paper(
        "Training language models to follow instructions with human feedback", "2203.02155", 2022
    )
    summary: ClassVar = "the mean negative log-likelihood of the demonstrations"

    def build(self) -> Supervised:
        """The method with these options."""
        return Supervised(name=self.name)
