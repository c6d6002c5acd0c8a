"""The actor of verl, with exact totals for each optimiser step and the method's tensors beside verl's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, fields
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.distributed import initialize_global_process_group_ray
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.utils.padding import no_padding_2_padding

from ...batch import StepTotals, TokenBatch
from ...method import Method
from ...methods import policy
from ...parts.entropy import entropy_from_logits
from .columns import like
from .loss import micro_batch, shares, token_batch
from .plan import RolloutPlan
from .recorder import TokenRecorder


def accurate_entropy(verls: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The engine's entropy from logits; where no gradient is asked for, the core's.

    verl's log-sum-exp minus mean logit loses entropies below about 1e-5 nats to rounding, and HAPO's statistics
    are of their logarithm. Not reached with fused kernels, nor with `use_remove_padding=False`.
    """

    def entropy(logits: Tensor, **options: Any) -> Tensor:
        return verls(logits, **options) if torch.is_grad_enabled() else entropy_from_logits(logits)

    return entropy


class HAPOActor(TrainingWorker):
    """verl's training worker: the same engine, optimiser, micro-batches and checkpoints."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.engine.compute_entropy_from_logits = accurate_entropy(self.engine.compute_entropy_from_logits)
        self._method: tuple[tuple[str, str], Method] | None = None
        self._at = (0, 0)
        self._recorder: TokenRecorder | None = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_loss_fn(self, loss_fn: Any) -> None:
        """verl's loss stays; ours calls it."""
        self._verl_loss = loss_fn
        self.loss_fn = self._loss

    def train_batch(self, data: TensorDict) -> TensorDict:
        """One optimiser step: `Method.step` over the rows of all ranks, then verl's own."""
        plan = RolloutPlan.of(data)
        first, done = self._at if self._at[0] == plan.step else (plan.step, 0)
        self._at = first, done + 1
        self._recorder = None
        if plan.record is not None and self.engine.is_mp_src_rank_with_outputs():
            self._recorder = TokenRecorder(plan, first + done, self.model_config.tokenizer)
        self._begin_step(data, self.method(plan), plan)
        output = super().train_batch(data)
        if self._recorder is not None:
            self._recorder.write()
        return output

    def method(self, plan: RolloutPlan) -> Method:
        """The method that the trainer named."""
        key = plan.method, repr(plan.options)
        if self._method is None or self._method[0] != key:
            self._method = key, policy(plan.method, **plan.options)
        return self._method[1]

    def _begin_step(self, data: TensorDict, method: Method, plan: RolloutPlan) -> None:
        """Write the totals of the optimiser step, and the signal and the tokens that it keeps, beside the data."""
        batch = token_batch(data)
        if not method.step_reads_policy and batch.keep is None:
            local = torch.tensor(astuple(batch.count()), device=get_device_id())
            dist.all_reduce(local, group=self.engine.get_data_parallel_group())
            tu.assign_non_tensor(data, hapo_totals=tuple(local.tolist()))
            return
        if method.step_reads_policy:
            batch = batch.replace(**self._score(data, batch.mask.shape[1]))
        everyone, first = self._gather(batch)
        step = method.step(everyone.replace(stats=plan.stats))
        for field in ("signal", "keep"):
            made = getattr(step, field)
            if made is not None:
                here = made[first : first + len(batch), : batch.mask.shape[1]].cpu()
                data[f"hapo_{field}"] = like(here, data["response_mask"])
        assert step.totals is not None
        tu.assign_non_tensor(data, hapo_totals=astuple(step.totals))

    def _score(self, data: TensorDict, width: int) -> dict[str, Tensor]:
        """Log-probs and entropies of the current policy for all rows of this rank."""
        ask = data.copy()
        tu.assign_non_tensor(ask, calculate_entropy=True, compute_loss=False, disable_auto_offload=True)
        scores = self.infer_batch(ask)
        return {
            ours: no_padding_2_padding(scores[theirs], data)[:, :width].float()
            for theirs, ours in (("log_probs", "logp"), ("entropy", "entropy"))
        }

    def _gather(self, batch: TokenBatch) -> tuple[TokenBatch, int]:
        """The rows of all ranks, in rank order and zero-padded to the widest, and where this rank's begin."""
        group, device = self.engine.get_data_parallel_group(), get_device_id()
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        width = torch.tensor(batch.mask.shape[1], device=device)
        dist.all_reduce(width, dist.ReduceOp.MAX, group=group)
        missing = int(width) - batch.mask.shape[1]
        gathered: dict[str, Any] = {}
        for f in fields(batch):
            x = getattr(batch, f.name)
            if not isinstance(x, Tensor):
                continue
            sent = x.to(device, torch.uint8 if x.dtype == torch.bool else x.dtype)
            if x.ndim > 1:
                sent = torch.nn.functional.pad(sent, (0, missing))
            parts = [torch.empty_like(sent) for _ in range(ranks)]
            dist.all_gather(parts, sent.contiguous(), group=group)
            gathered[f.name] = torch.cat(parts).to(x.dtype)
        return TokenBatch(**gathered), rank * len(batch)

    def _loss(self, model_output: dict[str, Any], data: TensorDict, dp_group: Any = None) -> tuple[Tensor, dict]:
        """verl's loss of a micro-batch, in which the policy loss is the method's."""
        plan = RolloutPlan.of(data)
        batch = token_batch(data, StepTotals(*tu.get_non_tensor_data(data, "hapo_totals", None)))
        if model_output.get("entropy") is not None:
            batch = batch.replace(entropy=no_padding_2_padding(model_output["entropy"], data).detach())
        batch = batch.replace(stats=plan.stats)
        with micro_batch(self.method(plan), batch, data["dp_size"]) as current:
            loss, metrics = self._verl_loss(model_output=model_output, data=data, dp_group=dp_group)
        assert current.out is not None
        metrics.update(shares(current.out, current.ranks))
        if self._recorder is not None:
            self._recorder.add(current.batch, current.out, data, self.method(plan))
        return loss, metrics


class HAPOWorker(ActorRolloutRefWorker):
    """verl's worker, with `HAPOActor` for its actor."""

    actor_worker_cls = HAPOActor

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """As verl's; on CPUs the process group is made first, since verl would name gloo twice."""
        if get_device_name() == "cpu":
            initialize_global_process_group_ray(backend="cpu:gloo")
        super().init_model()
