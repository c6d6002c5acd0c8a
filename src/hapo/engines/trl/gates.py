"""The gates of a GateRA adapter in the trainers of this folder: their entropy in the loss, their means in the log.

Models without gates need no PEFT, so nothing of `hapo.adapters` is imported before a gated layer is seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...batch import TokenBatch
from .auxiliary import AuxiliaryLoss

if TYPE_CHECKING:
    from ...adapters import Gates


class GateLogits(NamedTuple):
    """What the gates of the current policy say."""

    logits: Float[Tensor, "B T M"]
    """At the positions that predict the response tokens; differentiable."""
    names: list[str]
    """The modules of the M gates."""
    check_gradient: Callable[[], None]
    """Raises where a loss of the logits would not reach the gates."""

    @property
    def mean(self) -> Float[Tensor, "B T"]:
        """Mean gate of each token, detached."""
        return torch.sigmoid(self.logits.detach()).mean(-1)


def has_gates(model: nn.Module) -> bool:
    """Whether there is a GateRA adapter on a model."""
    return any(hasattr(module, "gatera_gate") for module in model.modules())


def recorded(model: nn.Module) -> AbstractContextManager[Gates | None]:
    """Records the gates of the forward pass inside; None where the model has none."""
    if not has_gates(model):
        return nullcontext(None)
    from ...adapters import record_gates

    return record_gates(model)


def gate_losses(gates: GateLogits | None, batch: TokenBatch, net: Any) -> list[AuxiliaryLoss]:
    """The gates' entropy, their mean, and the mean of each layer's: means over (module, valid token) of the step.

    Only the entropy has a weight, that of the adapter's config; the others are logged.

    Args:
        gates: None where the model has none.
        batch: the rows; `totals` are of the whole step.
        net: PEFT's model, without wrappers.

    Raises:
        RuntimeError: the entropy has a weight and no gradient, as with reentrant checkpointing.
    """
    if gates is None:
        return []
    from ...adapters.gates import entropy_weight, gate_entropy

    assert batch.totals is not None
    tokens, weight = batch.totals.tokens, entropy_weight(net)
    if weight:
        gates.check_gradient()
    terms = [AuxiliaryLoss("gate_entropy", weight, gate_entropy(gates.logits, batch.mask, tokens))]
    with torch.no_grad():
        sums = torch.sigmoid(gates.logits[batch.mask]).sum(0) / max(tokens, 1)
        terms.append(AuxiliaryLoss("gate/mean", 0.0, sums.mean()))
        numbers = [layer_number(name) for name in gates.names]
        for number in sorted({n for n in numbers if n is not None}):
            own = torch.tensor([n == number for n in numbers], device=sums.device)
            terms.append(AuxiliaryLoss(f"gate/layer_{number:02d}", 0.0, sums[own].mean()))
    return terms


def layer_number(module: str) -> int | None:
    """Of a module's name, the number of its layer: 3 of "model.layers.3.mlp.up_proj"; None without one."""
    match = re.search(r"\.(\d+)\.", f".{module}.")
    return int(match[1]) if match else None
