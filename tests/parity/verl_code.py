"""verl's registered functions, called as its trainer calls them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, get_adv_estimator_fn, get_policy_loss_fn, kl_penalty
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.workers.config import ActorConfig

from hapo import TokenBatch

from .compare import Loss


def advantage(name: str, batch: TokenBatch, **options: Any) -> Tensor:
    """Advantages of a registered estimator; the reward stands on the last token, as verl has it."""
    last = torch.arange(batch.mask.shape[1]).expand(batch.mask.shape).masked_fill(~batch.mask, 0).argmax(-1)
    rewards = torch.zeros_like(batch.old_logp).scatter(1, last.unsqueeze(1), batch.reward.unsqueeze(1))
    uid = np.array([f"prompt-{k}" for k in batch.group.tolist()], dtype=object)
    estimator = get_adv_estimator_fn(name)
    return estimator(token_level_rewards=rewards, response_mask=batch.mask.to(rewards), index=uid, **options)[0]


def loss(
    name: str,
    batch: TokenBatch,
    agg: str,
    advantage: Tensor,
    *,
    rollout_is: str | None = None,
    totals: dict[str, int] | None = None,
    **options: Any,
) -> Loss:
    """A registered policy loss as a function of logp; verl's KL loss where `kl_loss_coef` is given.

    `rollout_is` switches the rollout correction on, truncated at 2; `totals` are the counts of the optimiser step.
    """
    options["use_kl_loss"] = "kl_loss_coef" in options
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options)
    config.global_batch_info.update(totals or {}, loss_scale_factor=config.loss_scale_factor)
    mask = batch.mask
    weight = None
    if rollout_is is not None:
        weight = compute_rollout_correction_weights(batch.old_logp - batch.sampler_logp, mask, rollout_is, 2.0)[0]

    def loss(logp: Tensor) -> Tensor:
        policy, _ = get_policy_loss_fn(name)(
            old_log_prob=batch.old_logp,
            log_prob=logp,
            advantages=advantage,
            response_mask=mask,
            loss_agg_mode=agg,
            config=config,
            rollout_is_weights=weight,
        )
        if not config.use_kl_loss:
            return policy
        kl = kl_penalty(logprob=logp, ref_logprob=batch.ref_logp, kl_penalty=config.kl_loss_type)
        penalty = agg_loss(loss_mat=kl, loss_mask=mask, loss_agg_mode=agg, **config.global_batch_info)
        return policy + config.kl_loss_coef * penalty

    return loss
