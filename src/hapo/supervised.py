"""Supervised: a frozen weight on each target token of a demonstration; loss().

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .batch import LossOutput, StepTotals, TokenBatch, masked
from .parts.reduce import token_mean
from .stage import Record, Stage, describe

SCORES = ("entropy", "rank", "expected_rank")
"""Fields that scoring gives beside `logp`."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Supervised:
    """A supervised method: each target's negative log-likelihood times a weight, a constant for autograd.

        L = sum_it m w (-logp) / N,   dL / dlogits = w (P - onehot) / N,   N the valid targets of the step

    There is nothing to prepare: `batch = hapo.TokenBatch(mask=..., logp=...)`, with the fields that the weight
    reads, then `loss(batch)`. Without totals a batch is a whole optimiser step. For slices of one, give it its
    counts first, `batch.replace(totals=batch.count())`, over all ranks; `rows` keeps them.
    """

    name: str
    weight: Callable[[Record], Float[Tensor, "B T"]] | None = None
    """Factor of each target's loss, made of the current policy's scores; None: 1 everywhere."""
    reduce: Callable[[Tensor, Tensor, StepTotals], Float[Tensor, ""]] = token_mean
    """(loss, mask, totals) -> scalar, normalised by the totals of the optimiser step."""
    breaks: frozenset[str] = frozenset()
    """Laws that these choices break by their definition, as in `Method`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options it was built from, for records and checkpoints."""

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items() if k != "method")
        return f"Supervised({self.name!r}{', ' if options else ''}{options})"

    def replace(self, **changes: Any) -> Supervised:
        """A copy with other choices; its options say which, so that records and checkpoints do."""
        if self.options and "options" not in changes:
            kept = {k: v for k, v in self.options.items() if k not in changes}
            changes["options"] = {**kept, "replaced": sorted({*kept.get("replaced", ()), *changes})}
        return replace(self, **changes)

    @property
    def stages(self) -> dict[str, str]:
        """The choice of each stage in words."""
        weight = {} if self.weight is None else {"weight": describe(self.weight)}
        return {**weight, "reduce": describe(self.reduce)}

    @property
    def reads(self) -> frozenset[str]:
        """What the weight reads of `SCORES`; all of them where it is a function of one's own, not a `Stage`."""
        if self.weight is None:
            return frozenset()
        return frozenset(SCORES).intersection(self.weight.reads if isinstance(self.weight, Stage) else SCORES)

    def loss(self, batch: TokenBatch) -> LossOutput:
        """Loss of an optimiser step, or of any slice of it; see `LossOutput`.

        A target of weight 0 adds nothing, even if its log-probability is -inf. Without valid targets the loss and
        its gradient are 0.

        Raises:
            ValueError: a field that this method reads is missing.
        """
        record, mask = Record(self.name, batch), batch.mask
        totals = batch.count() if batch.totals is None else batch.totals
        logp = record.logp
        with torch.no_grad():
            weight = torch.ones_like(logp) if self.weight is None else self.weight(record)
            weight = masked(weight.detach(), mask)
        total = self.reduce(-masked(logp, weight != 0) * weight, mask, totals)
        with torch.no_grad():
            n = max(totals.tokens, 1)
            metrics = {"loss": total.detach(), "nll": -logp.sum() / n, "weight": weight.sum() / n}
        return LossOutput(total, metrics, {"weight": weight})
