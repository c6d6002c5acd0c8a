"""Reductions of per-token losses to one number, with the counts of the whole optimiser step.

The losses of the slices of a step add up to the step's loss, because every slice divides by the step's totals.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..batch import StepTotals


def token_mean(loss: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], totals: StepTotals) -> Float[Tensor, ""]:
    """sum_it m L / N, N the kept tokens of the step (DAPO, arXiv 2503.14476, eq. 8). 0 where N = 0."""
    return _on(loss, mask).sum() / max(totals.kept, 1)


def sequence_mean(loss: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], totals: StepTotals) -> Float[Tensor, ""]:
    """(1/S) sum_i (1/n_i) sum_t m L, S the sequences of the step with n_i > 0 (GRPO, arXiv 2402.03300, eq. 3)."""
    per_sequence = _on(loss, mask).sum(-1) / mask.sum(-1).clamp_min(1)
    return per_sequence.sum() / max(totals.sequences, 1)


def sequence_sum(
    loss: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], totals: StepTotals, constant: float = 1.0
) -> Float[Tensor, ""]:
    """(1/S) sum_i sum_t m L / C with a fixed constant C (Dr. GRPO, arXiv 2503.20783)."""
    return _on(loss, mask).sum() / (max(totals.sequences, 1) * constant)


def valid_token_mean(
    loss: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], totals: StepTotals
) -> Float[Tensor, ""]:
    """sum_it m L_it / N, N all valid tokens of the step, kept or not (TRL's top_entropy_quantile)."""
    return _on(loss, mask).sum() / max(totals.tokens, 1)


def _on(loss: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The losses that count; `where`, so that NaN elsewhere is no NaN here."""
    return torch.where(mask, loss, 0.0)
