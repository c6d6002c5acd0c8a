"""Training stops at the first number that is not finite, before the weights are stepped or saved."""

from __future__ import annotations

import math

from torch import Tensor, nn

LIKELY = {
    "loss": "a log-prob or an entropy of the current policy is not finite: weights that an earlier step drove "
    "away, a half precision that overflows, or a reward that is infinite",
    "gradient norm": "the backward pass overflowed: a half precision, or a ratio or weight that ran away",
    "weights": "the optimiser's step overflowed: a learning rate far too high for this model",
}
"""What was not finite -> the likely cause."""


class NotFiniteError(RuntimeError):
    """A loss, a gradient norm or a weight is NaN or infinite."""


def check(what: str, value: float | Tensor, step: int) -> None:
    """Raise a `NotFiniteError` with the step (from 1) and the likely cause, unless the number is finite."""
    if not math.isfinite(value):
        raise NotFiniteError(
            f"the {what} is {float(value)} at optimiser step {step}, and training stops before it reaches the "
            f"weights. Likely: {LIKELY[what]}. The last checkpoint is whole: go on from it with a lower "
            "learning_rate, dtype float32 or another seed"
        )


def check_weights(model: nn.Module, step: int) -> None:
    """`check` of every parameter, before they are saved; -inf may be meant, in the bias of a masked vocabulary."""
    for name, parameter in model.named_parameters():
        if (parameter.isnan() | parameter.isposinf()).any():
            raise NotFiniteError(
                f"{name} holds NaN or infinity after optimiser step {step}, and is not saved. Likely: "
                f"{LIKELY['weights']}. The last checkpoint is whole: go on from it with a lower learning_rate"
            )
