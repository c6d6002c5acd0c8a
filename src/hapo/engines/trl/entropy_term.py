"""TRL's entropy term, -c H, and the control of its weight c by the entropy itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ...batch import TokenBatch, masked
from .auxiliary import AuxiliaryLoss


class EntropyTerm:
    """-c H in the loss of an optimiser step, H the mean entropy of the step's tokens that the method keeps, nats.

    With `use_adaptive_entropy` (Skywork-OR1, arXiv 2505.22312) c acts in a step only if H of the step before was
    at or below `entropy_target`; after each step c rises by `entropy_coef_delta` if H was, and falls by it if it
    was not, within `entropy_coef_min` and `entropy_coef_max`. H is of all micro-batches and ranks: TRL's own term
    is the mean of its micro-batches' means, which differs where these have different numbers of tokens.
    """

    def __init__(self, args: Any) -> None:
        self._args = args
        self.coef: float = args.entropy_coef
        """c as it stands."""
        self.last: float = float("inf")
        """H of the step before, nats."""
        self._sum: Tensor | None = None

    @property
    def acts(self) -> bool:
        """Whether any step may have the term."""
        return self._args.use_adaptive_entropy or self.coef != 0.0

    @property
    def weight(self) -> float:
        """c in this optimiser step."""
        held = self._args.use_adaptive_entropy and self.last > self._args.entropy_target
        return 0.0 if held else self.coef

    def share(self, batch: TokenBatch, entropy: Float[Tensor, "B T"], *, train: bool) -> AuxiliaryLoss:
        """The part that some rows of the step have in the term."""
        assert batch.totals is not None
        kept = batch.mask if batch.keep is None else batch.mask & batch.keep
        value = masked(entropy, kept).sum() / max(batch.totals.kept, 1)
        if train:
            self._sum = value.detach() if self._sum is None else self._sum + value.detach()
        return AuxiliaryLoss("entropy_term", -self.weight, value)

    def end_of_step(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Set the weight of the next step; `add_up` adds a tensor up over the ranks."""
        if self._sum is None:
            return
        args, self.last = self._args, float(add_up(self._sum))
        self._sum = None
        if args.use_adaptive_entropy:
            up = self.last <= args.entropy_target
            changed = self.coef + (args.entropy_coef_delta if up else -args.entropy_coef_delta)
            self.coef = min(max(changed, args.entropy_coef_min), args.entropy_coef_max)

    def state(self) -> dict[str, float]:
        """What a checkpoint holds."""
        return {"coef": self.coef, "last": self.last}

    def take_up(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.coef, self.last = state["coef"], state["last"]
