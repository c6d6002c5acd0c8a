"""Losses beside the method's own, such as the load balancing of a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class AuxiliaryLoss(NamedTuple):
    """A term that is added to the loss of an optimiser step."""

    name: str
    """Under which its value is logged."""
    weight: float
    """Factor in the loss; the log is without."""
    value: Float[Tensor, ""]
    """The share of these rows in the step's value, differentiable: shares of all passes, micro-batches and ranks
    add up to it, as those of the method's loss do. A mean over tokens is their sum / `batch.totals.tokens`."""


def router_losses(value: Float[Tensor, ""] | None, weight: float, micro_batches: int) -> list[AuxiliaryLoss]:
    """The load balancing of a mixture of experts: its mean over the micro-batches of the step, on all ranks.

    Args:
        value: mean over the rows of this micro-batch, which is no sum over tokens: it depends on the split. None
            where the model has none.
        weight: the architecture's coefficient, or the user's.
        micro_batches: of the optimiser step, on all ranks.
    """
    return [] if value is None else [AuxiliaryLoss("aux_loss", weight, value / micro_batches)]


def total(loss: Float[Tensor, ""], auxiliary: Sequence[AuxiliaryLoss], ranks: int) -> Float[Tensor, ""]:
    """What goes backward: shares of the step, times the ranks, over which data-parallel engines take the mean.

    Raises:
        ValueError: an auxiliary loss is no single number.
    """
    loss = loss * ranks
    for name, weight, value in auxiliary:
        if value.ndim:
            raise ValueError(
                f"the auxiliary loss {name!r} has shape {tuple(value.shape)} and must be a single number: add up "
                "over the tokens of batch.mask, and divide by batch.totals.tokens"
            )
        loss = loss + weight * value * ranks
    return loss
