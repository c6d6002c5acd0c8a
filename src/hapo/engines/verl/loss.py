"""verl's policy loss "hapo": `Method.loss` on a micro-batch, with what the rollout froze for its tokens.

verl's own `ppo_loss` calls it, and adds its KL penalty, its entropy bonus and its metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.core_algos import register_policy_loss
from verl.utils.metric import AggregationType, Metric

from ...batch import StepTotals, TokenBatch
from ...method import LossOutput, Method
from ..metrics import NAMES
from .config import NAME, wrong_mode

FIELDS = {
    "hapo_mask": "mask",
    "hapo_reward": "reward",
    "hapo_verdict": "verdict",
    "hapo_group": "group",
    "hapo_signal": "signal",
    "hapo_token_reward": "token_reward",
    "hapo_keep": "keep",
    "old_log_probs": "old_logp",
    "entropy": "old_entropy",
    "rollout_log_probs": "sampler_logp",
    "rollout_is_weights": "weight",
    "ref_log_prob": "ref_logp",
    "advantages": "advantage",
}
"""Field of verl's data -> field of `TokenBatch`."""
AS_BOOL = ("mask", "keep")


@dataclass
class Slice:
    """A micro-batch on its way through verl's loss."""

    method: Method
    batch: TokenBatch
    ranks: int
    """Data-parallel ranks, whose gradients verl averages."""
    out: LossOutput | None = None


_SLICE: ContextVar[Slice] = ContextVar("slice")


@contextmanager
def micro_batch(method: Method, batch: TokenBatch, ranks: int) -> Iterator[Slice]:
    """Give `policy_loss` what verl's registry does not hand on."""
    current = Slice(method, batch, ranks)
    token = _SLICE.set(current)
    try:
        yield current
    finally:
        _SLICE.reset(token)


@register_policy_loss(NAME)
def policy_loss(
    old_log_prob: Float[Tensor, "B T"],
    log_prob: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    response_mask: Float[Tensor, "B T"],
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Float[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Any]]:
    """This micro-batch's share of the optimiser step's loss; the totals of the step are exact and frozen.

    Differentiable in `log_prob` alone. Reduced as the method says; `loss_agg_mode` is for verl's own terms.

    Raises:
        RuntimeError: another trainer than hapo's called it.
    """
    current = _SLICE.get(None)
    if current is None:
        raise RuntimeError(wrong_mode())
    current.batch = current.batch.replace(logp=log_prob)
    current.out = current.method.loss(current.batch)
    return current.out.loss * current.ranks, {}


def token_batch(data: TensorDict, totals: StepTotals | None = None) -> TokenBatch:
    """The rows of verl's data, padded: what `Method.prepare` froze, and what verl computed."""
    found = data.select(*(FIELDS.keys() & set(data.keys()))).to_padded_tensor()
    tensors: dict[str, Any] = {FIELDS[name]: x for name, x in found.items()}
    for name in AS_BOOL:
        if name in tensors:
            tensors[name] = tensors[name].bool()
    return TokenBatch(**tensors, totals=totals)


def shares(out: LossOutput, ranks: int) -> dict[str, Metric]:
    """The method's metrics for verl, which adds them up over micro-batches and averages over ranks."""
    return {
        f"{NAME}/{NAMES[k]}": Metric(AggregationType.SUM, v * ranks) for k, v in out.metrics.items() if k in NAMES
    }
