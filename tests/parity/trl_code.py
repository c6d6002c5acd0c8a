"""TRL's own code for advantages and losses, without a model: only the forward pass and the rollout are ours."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from hapo import TokenBatch

from .compare import Loss


def entropy_of(batch: TokenBatch, logp: Tensor) -> Tensor:
    """The batch's entropies, with a gradient that reaches the log-probs."""
    return batch.entropy * (logp - logp.detach() + 1)


class _Offline:
    """A trainer that was given its log-probs instead of a model; mixed in before TRL's class."""

    def __init__(self, args: Any):
        self.args = args
        self.epsilon_low = args.epsilon
        self.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        self.accelerator = Accelerator(cpu=True)
        self.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
        self.ref_model = object()
        self.current_gradient_accumulation_steps = args.gradient_accumulation_steps
        self.aux_loss_enabled = self._is_vlm = False
        self.entropy_coef = getattr(args, "entropy_coef", 0.0)
        self._entropy_bonus_enabled = self.entropy_coef != 0 or getattr(args, "use_adaptive_entropy", False)
        self._last_world_entropy, self._entropy_window_stats = float("inf"), None
        self.environment_factories = self.environments = self.tools = None
        self.eos_token_ids, self._tokenizer = [1], SimpleNamespace(pad_token_id=0)
        weights = getattr(args, "reward_weights", None) or [1.0]
        self.reward_weights = torch.tensor(weights)
        self.reward_funcs, self.reward_func_names = [None] * len(weights), [f"r{i}" for i in range(len(weights))]
        self._metrics = {"train": defaultdict(list)}
        self._logs = {name: [] for name in ("prompt", "completion", "advantages")}
        self._logs |= {"rewards": defaultdict(list), "extra": {}}
        self._pending_extra_logs, self._pending_metrics = {}, {}

    def __getattr__(self, name: str) -> Any:
        """Most of TRL's attributes are its configuration's, by the same name."""
        return getattr(self.__dict__["args"], name)

    def _get_per_token_logps_and_entropies(self, model: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        if model is self.ref_model:
            return self.batch.ref_logp, self.batch.entropy, None
        return self.logps, entropy_of(self.batch, self.logps), None

    def _calculate_rewards(self, *_: Any) -> Tensor:
        return self.batch.reward.unsqueeze(1) if self.batch.rewards is None else self.batch.rewards

    def rollout(self, batch: TokenBatch) -> dict[str, Tensor]:
        """What TRL makes of a rollout batch: advantages, importance weights."""
        self.batch, self.logps = batch, batch.old_logp
        return self._generate_and_score_completions([{"prompt": "?"} for _ in range(len(batch))])

    def loss(self, batch: TokenBatch, **inputs: Tensor) -> Loss:
        """TRL's loss of a micro-batch with advantages, as a function of logp."""
        ids = torch.zeros(len(batch), 1, dtype=torch.long)
        inputs = {
            "prompt_ids": ids,
            "prompt_mask": ids,
            "completion_ids": batch.mask.long(),
            "completion_mask": batch.mask.long(),
            "advantages": batch.advantage,
            "old_per_token_logps": batch.old_logp,
            "old_logps": (batch.old_logp * batch.mask).sum(1),
            "ref_per_token_logps": batch.ref_logp,
            "num_items_in_batch": batch.mask.sum(),
            **inputs,
        }

        def loss(logp: Tensor) -> Tensor:
            self.batch, self.logps = batch, logp
            return self._compute_loss(None, inputs)

        return loss


class _GRPO(_Offline, GRPOTrainer):
    def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
        tokens = [[1] * self.batch.mask.shape[1]] * len(prompts)
        return tokens, tokens, self.batch.mask.int().tolist(), prompts, self.batch.sampler_logp, {}, None, []


class _RLOO(_Offline, RLOOTrainer):
    def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
        tokens = [[1] * self.batch.mask.shape[1]] * len(prompts)
        return tokens, tokens, prompts


def grpo(rows: int = 16, num_generations: int = 4, **options: Any) -> _GRPO:
    """TRL's GRPOTrainer with these options of GRPOConfig."""
    return _GRPO(_config(GRPOConfig, per_device_train_batch_size=rows, num_generations=num_generations, **options))


def rloo(**options: Any) -> _RLOO:
    """TRL's RLOOTrainer with these options of RLOOConfig."""
    return _RLOO(_config(RLOOConfig, per_device_train_batch_size=16, num_generations=4, **options))


def _config(cls: type, **options: Any) -> Any:
    return cls(output_dir=tempfile.gettempdir(), use_cpu=True, bf16=False, report_to="none", **options)
