"""verl's synchronous trainer with the advantage, loss and sampling of a `Method`.

What is overridden, and nothing else: the worker class, the client of the rollout servers (the temperature rule),
the advantage (it gets the entropies that verl computes and drops), the actor's update (it gets what was frozen),
checkpoints (statistics, and the count of optimiser steps), and what is recorded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf, open_dict
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path
from verl.workers.utils.padding import response_to_nested

from ...batch import EntropyStats, TokenBatch
from ...outputs import write_whole
from ...samplers.rule import rule_of
from ..identity import differences, identity
from ..metrics import rollout_metrics, sampler_gap
from .config import NAME, Settings, check, recipe, resolve_method, select
from .estimator import estimation
from .plan import RolloutPlan
from .records import Records
from .sampling import TemperedClient, Tempering, check_rollout
from .worker import HAPOWorker

STATE = "hapo.json"
"""In a checkpoint's folder."""


@register_trainer(NAME)
class HAPOTrainerSync(PPOTrainerSync):
    """`trainer.v1.trainer_mode=hapo`: verl's synchronous trainer, training with any `hapo.Method`.

    Entropies are those of verl's pass over the old policy at T_base; group means, statistics and signals are taken
    over the whole rollout batch, in this process, and frozen. Each optimiser step is normalised by its exact
    totals over all ranks. verl's KL penalty, entropy bonus, rollout correction, metrics and checkpoints stay.

    Raises:
        ValueError: the configuration asks for what a method cannot honour; with the remedy.
        ImportError: the rollout's engine is missing or was not tested.
        FileExistsError: the run's folder holds another run, and nothing is resumed.
    """

    def __init__(self, config: Any) -> None:
        plain = OmegaConf.to_container(config, resolve=True)
        assert isinstance(plain, dict)
        self.settings = Settings.of(plain)
        self.method = resolve_method(plain, self.settings)
        check(plain, self.method)
        self.temperature_stats: EntropyStats | None = None
        self._sampled_with: EntropyStats | None = None
        self._plan: RolloutPlan | None = None
        self._steps = 0
        checkpoint = resumed_from(plain)
        self.records = Records.open(plain, self.settings, recipe(plain, self.method), checkpoint)
        if checkpoint is not None:
            self._load_state(checkpoint / STATE)
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # verl asks for the name of its own
        super().__init__(config)
        self.tempering = Tempering() if self.method.temperature_rule is not None else None

    # -- workers and rollout --------------------------------------------------------------------------------

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in list(self.role_worker_mapping):
            if str(role).startswith("actor"):
                self.role_worker_mapping[role] = ray.remote(HAPOWorker)

    def get_llm_client(self) -> Any:
        """verl's client; with an adaptive temperature one that sends the rule."""
        if self.tempering is None:
            return super().get_llm_client()
        return self.llm_server_manager.get_client(client_cls=TemperedClient, board=self.tempering.board)

    def on_init_end(self) -> None:
        """As verl's; then the rollout servers are asked whether they apply rules."""
        super().on_init_end()
        if self.tempering is not None:
            check_rollout(self.llm_server_manager.server_handles, self.tokenizer.encode("1"))

    def on_validate_begin(self) -> None:
        """Validation samples at its own temperature."""
        super().on_validate_begin()
        if self.tempering is not None:
            self.tempering.send(None)

    def prepare_step(self) -> dict[str, Any]:
        """The rollout's prompts go out, with the statistics of the last one."""
        self._sampled_with = self.temperature_stats
        if self.tempering is not None:
            self.tempering.send(rule_of(self.method, self._sampled_with))
        return super().prepare_step()

    # -- advantage and update -------------------------------------------------------------------------------

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        _refuse_split_sessions(batch.keys)
        names = {"old_log_probs": "old_logp", "entropy": "old_entropy", "ref_log_prob": "ref_logp"}
        wanted = [*names, "rollout_log_probs", "response_mask", "rm_scores", "extra_fields"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=wanted)
        nested = data["response_mask"]
        verdict = self._verdict(data)
        found = set(data.keys())
        padded = data.select(*(set(wanted) & found - {"extra_fields"})).to_padded_tensor()
        fields = {ours: padded[theirs] for theirs, ours in names.items() if theirs in found}
        with estimation(self.method, {**fields, "verdict": verdict}) as current:
            batch = super()._compute_advantage(batch, metrics)
        prepared = current.prepared
        assert prepared is not None
        scored = current.scored
        assert scored is not None
        batch = self._freeze(batch, prepared, nested)
        if "rollout_log_probs" in found:
            prepared = prepared.replace(sampler_logp=padded["rollout_log_probs"])
        t_base = self.config.actor_rollout_ref.rollout.temperature
        figures = rollout_metrics(prepared, scored, self.method.temperature_rule, self._sampled_with, t_base)
        metrics.update({f"{NAME}/{k}": v for k, v in {**figures, **sampler_gap(prepared)}.items()})
        if prepared.stats is not None:  # a rollout of which every group was dropped leaves the former ones
            self.temperature_stats = prepared.stats
        added = torch.tensor([bool(tag.get("is_padding", False)) for tag in batch.tags])  # by verl, to fill ranks
        self._plan = self._plan_of(prepared, int((prepared.scored & ~added).sum()), t_base)
        return batch

    def _verdict(self, data: TensorDict) -> Tensor:
        """Of each response (B,): what verl's group filter would go by, `algorithm.filter_groups.metric`."""
        name = OmegaConf.select(self.config, "algorithm.filter_groups.metric") or "reward"
        if name == "reward":
            return torch.stack([row.float().sum() for row in data["rm_scores"].unbind()])
        found = []
        for extra in tu.get(data, "extra_fields"):
            info = extra.get("reward_extra_info", {})
            if name not in info:
                raise ValueError(
                    f"algorithm.filter_groups.metric={name} names the verdict, and the reward function returns "
                    f"only {sorted(info)}: name one of them, or reward"
                )
            found.append(float(info[name]))
        return torch.tensor(found)

    def _freeze(self, batch: Any, prepared: TokenBatch, nested: Tensor) -> Any:
        """Write what the method made beside verl's own fields; every field reaches the actors."""
        made: dict[str, Any] = {
            "hapo_mask": response_to_nested(prepared.mask, nested),
            "hapo_reward": prepared.reward,
            "hapo_verdict": prepared.verdict,
            "hapo_group": prepared.group,
            "hapo_response": torch.arange(len(prepared)),
        }
        for field in ("signal", "keep", "token_reward"):
            x = getattr(prepared, field)
            if x is not None:
                made[f"hapo_{field}"] = response_to_nested(x, nested)
        fields = TensorDict(made, batch_size=len(prepared))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def _plan_of(self, prepared: TokenBatch, responses: int, t_base: float) -> RolloutPlan:
        folder = self.records.tokens_of(self.global_steps) if self.records is not None else None
        return RolloutPlan(
            method=self.method.name,
            options={k: v for k, v in self.method.options.items() if k != "method"},
            step=self._steps + 1,
            stats=prepared.stats or self.temperature_stats,
            sampled_with=self._sampled_with,
            t_base=t_base,
            responses=responses,
            record=folder,
            groups=max(1, self.settings.record_tokens_rows // self.config.actor_rollout_ref.rollout.n),
        )

    def on_train_end(self) -> None:
        """Reached where the epochs end before the steps, or a finished run is started again."""
        super().on_train_end()
        if self.records is not None:
            why = "max_steps" if self.global_steps > self.total_training_steps else "epochs"
            self.records.finish(self._steps, why)

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
        """As verl's; its tokens and seconds are counted for the records."""
        began = time.perf_counter()
        batch = super().step(metrics, timing_raw)
        if self.records is not None:
            self.records.tokens += sum(tag["seq_len"] for tag in batch.tags if not tag.get("is_padding"))
            self.records.seconds += time.perf_counter() - began
        return batch

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        assert self._plan is not None
        batch.extra_info[NAME] = self._plan.to_dict()
        batch = super()._update_actor(batch, metrics)
        for name in [name for name in metrics if name.startswith(f"actor/{NAME}/")]:
            metrics[name.removeprefix("actor/")] = metrics.pop(name)
        actor = self.config.actor_rollout_ref.actor
        rows = actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n
        self._steps += len(batch) // rows * actor.ppo_epochs
        return batch

    # -- checkpoints and records ----------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        folder.mkdir(parents=True, exist_ok=True)
        stats = self.temperature_stats
        state = {
            "method": identity(self.method),
            "steps": self._steps,
            "stats": None if stats is None else stats.to_dict(),
        }
        if self.records is not None:
            state |= {"tokens": self.records.tokens, "seconds": self.records.seconds}
        write_whole(folder / STATE, json.dumps(state, indent=2) + "\n")
        super()._save_checkpoint()  # names the folder the latest one when all of it is written

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.records is not None:
            self.records.begin(self._steps)

    def _load_state(self, file: Path) -> None:
        if not file.is_file():
            raise ValueError(
                f"{file} is missing: the checkpoint is of another trainer, and the statistics of its last rollout "
                "are not known. Set trainer.resume_mode=disable and actor_rollout_ref.model.path to its weights"
            )
        state = json.loads(file.read_text())
        if details := differences(state["method"], identity(self.method)):
            raise ValueError(
                f"{file.parent} is a checkpoint of another method ({details}): resume with the method that it was "
                "written with, or begin another run (trainer.default_local_dir)"
            )
        self._steps = state["steps"]
        self.temperature_stats = None if state["stats"] is None else EntropyStats(**state["stats"])
        if self.records is not None:
            self.records.tokens, self.records.seconds = state.get("tokens", 0), state.get("seconds", 0.0)

    def _val_metrics_update(
        self, data_sources: Any, sample_uids: Any, infos: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self.records is not None:
            self.records.add_evaluation(self._steps, sample_uids, infos)
        return super()._val_metrics_update(data_sources, sample_uids, infos, *args, **kwargs)

    def _compute_metrics(self, batch: Any, metrics: Any, timing_raw: Any, global_steps: int, epoch: Any) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)
        if self.records is not None:
            self.records.add_metrics(self._steps, metrics)
            if global_steps >= self.total_training_steps:
                self.records.finish(self._steps, "max_steps")


def resumed_from(config: Mapping[str, Any]) -> Path | None:
    """The folder of the checkpoint that verl will resume, by its own rules."""
    mode = select(config, "trainer.resume_mode")
    if mode == "resume_path":
        return Path(select(config, "trainer.resume_from_path", "")).resolve()
    found = find_latest_ckpt_path(select(config, "trainer.default_local_dir")) if mode == "auto" else None
    return None if found is None else Path(found).resolve()


def _refuse_split_sessions(keys: list[str]) -> None:
    """One row a response: verl writes a session of several outputs as several rows, uid_session_index.

    Raises:
        ValueError: there is such a session.
    """
    for key in keys:
        if not key.endswith("_0"):
            raise ValueError(
                f"the agent loop returned a session in several outputs ({key}), and a token group average over "
                "its parts would count it several times: return one output a session"
            )
