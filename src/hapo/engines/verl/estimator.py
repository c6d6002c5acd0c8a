"""verl's advantage estimator "hapo": `Method.prepare` over the rollout batch of all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

from ...batch import TokenBatch
from ...method import Method
from ...parts.credit import onto_valid_tokens
from .config import NAME, wrong_mode


@dataclass
class Estimation:
    """What the estimator needs besides verl's arguments, and what it leaves behind."""

    method: Method
    fields: dict[str, Tensor]
    """Fields of `TokenBatch`: old_logp, old_entropy, verdict, ..."""
    scored: Bool[Tensor, "B T"] | None = None
    """Valid response tokens of what could be scored, without those that verl's rollout correction rejects."""
    prepared: TokenBatch | None = None
    """What `Method.prepare` made; its mask lacks the groups that the method drops."""


_ESTIMATION: ContextVar[Estimation] = ContextVar("estimation")


@contextmanager
def estimation(method: Method, fields: dict[str, Tensor]) -> Iterator[Estimation]:
    """Give `estimate` what verl's registry does not hand on."""
    current = Estimation(method, fields)
    token = _ESTIMATION.set(current)
    try:
        yield current
    finally:
        _ESTIMATION.reset(token)


@register_adv_est(NAME)
def estimate(
    token_level_rewards: Float[Tensor, "B T"],
    response_mask: Float[Tensor, "B T"],
    config: Any = None,
    index: np.ndarray | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Advantages and returns, which are the same here, by the method of the running trainer.

    The reward of a response is the sum of its token rewards; rows with equal `index` are one group. A response
    that the rollout correction rejects counts there with its reward, as in verl; one whose reward is NaN does not.
    A method with `advantage="token_reward"` reads the token rewards themselves, of which those at the output of
    tools go to the token before it.

    Raises:
        RuntimeError: another trainer than hapo's called it.
    """
    current = _ESTIMATION.get(None)
    if current is None:
        raise RuntimeError(wrong_mode())
    assert index is not None
    _, group = np.unique(index.astype(str), return_inverse=True)
    mask, rewards = response_mask.bool(), token_level_rewards.float()
    batch = TokenBatch(
        mask=mask,
        reward=rewards.sum(1),
        token_reward=onto_valid_tokens(rewards, mask) if current.method.credit is not None else None,
        group=torch.as_tensor(group, device=response_mask.device),
        **current.fields,  # type: ignore[arg-type]
    )
    current.scored = batch.mask & batch.scored.unsqueeze(1)
    # Tokens of dropped groups keep their rewards, which records show.
    prepared = current.prepared = current.method.prepare(batch).replace(token_reward=batch.token_reward)
    assert prepared.advantage is not None
    return prepared.advantage, prepared.advantage
