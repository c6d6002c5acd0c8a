"""verl's trainer without a queue, with the advantage, loss and sampling of a `Method`: `python -m hapo.verl_main`.

verl has no registry of such trainers, and its own main names the class; so the task runner, which verl's `run_ppo`
takes from recipes, is hapo's too. Overridden is what is overridden of the default trainer. The loop over batches
is one function of verl's, which shows the step's metrics to `_balance_batch` alone: there the records get them.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from omegaconf import OmegaConf, open_dict
from verl.trainer.main_ppo_v0 import BaseTaskRunner
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.utils.config import omega_conf_to_dataclass

from .columns import ProtoColumns
from .config import NAME
from .driver import Driver, resumed_from
from .estimator import estimation
from .rewards import COLUMN
from .sampling import TemperedAgentLoopManager
from .worker import HAPOWorker


class HAPORayTrainer(Driver, RayPPOTrainer):
    """`trainer.use_v1=False`: verl's `RayPPOTrainer`, training with any `hapo.Method`. See `Driver`."""

    def __init__(self, config: Any, **others: Any) -> None:
        self.begin(config, queue=False)
        self._metrics: dict[str, Any] | None = None
        self._validating = self._checked = False
        self._began = 0.0
        if self.method.temperature_rule is not None:
            manager = f"{TemperedAgentLoopManager.__module__}.{TemperedAgentLoopManager.__name__}"
            with open_dict(config):
                config.actor_rollout_ref.rollout.agent.agent_loop_manager_class = manager
        super().__init__(config, **others)

    # -- workers and rollout --------------------------------------------------------------------------------

    def init_workers(self) -> None:
        """As verl's; the board of the rule is there before the clients that read it."""
        self.start_tempering()
        super().init_workers()

    def _validate(self, *args: Any, **kwargs: Any) -> Any:
        self.send_no_rule()
        self._validating = True
        try:
            return super()._validate(*args, **kwargs)
        finally:
            self._validating = False

    def _get_gen_batch(self, batch: Any) -> Any:
        """The first that verl calls in a step, and in a validation: the rollout servers are awake."""
        if not self._checked:
            self._checked = True
            self.check_rollout()
        if not self._validating:
            self._record()
            self._began = time.perf_counter()
            self.send_rule()
        return super()._get_gen_batch(batch)

    # -- advantage and update -------------------------------------------------------------------------------

    def _balance_batch(self, batch: Any, metrics: dict[str, Any], **others: Any) -> None:
        """The rollout is whole, and nothing has read its rewards."""
        super()._balance_batch(batch, metrics, **others)
        self._metrics = metrics
        self.place_scores(ProtoColumns(batch))
        if COLUMN in batch.non_tensor_batch:  # which verl would print into its dumps of rollouts
            batch.non_tensor_batch.pop(COLUMN)
            batch.meta_info["reward_extra_keys"].remove(COLUMN)

    def _compute_old_log_prob(self, batch: Any) -> Any:
        scores, speed = super()._compute_old_log_prob(batch)
        columns = ProtoColumns(batch)
        columns.write({"entropy": scores.batch["entropys"]})
        self._estimation.fields = self.known(columns) | {"old_logp": scores.batch["old_log_probs"]}
        return scores, speed

    def _compute_ref_log_prob(self, batch: Any) -> Any:
        scores = super()._compute_ref_log_prob(batch)
        self._estimation.fields["ref_logp"] = scores.batch["ref_log_prob"]
        return scores

    def _update_actor(self, batch: Any) -> Any:
        columns = ProtoColumns(batch)
        figures = self.freeze(columns, self._estimation)
        assert self._plan is not None
        columns.tell(NAME, self._plan.to_dict())
        output = super()._update_actor(batch)
        metrics = output.meta_info["metrics"]
        self.updated(len(batch), metrics)
        metrics.update(figures)
        if self.records is not None:
            self.records.tokens += sum(batch.meta_info["global_token_num"])
            self.records.seconds += time.perf_counter() - self._began
        return output

    # -- checkpoints and records ----------------------------------------------------------------------------

    def fit(self) -> None:
        """verl's loop, with one estimation open for all of its steps.

        A finished run that is started again stays as it is, where verl would train one step more.
        """
        checkpoint = resumed_from(OmegaConf.to_container(self.config, resolve=True))
        if checkpoint is not None and int(checkpoint.name.rpartition("_")[2]) >= self.total_training_steps:
            print(f"{checkpoint} is the run's last step: nothing is left to train")
            return
        with estimation(self.method, {}) as self._estimation:
            super().fit()
        if not self.config.trainer.get("val_only", False):
            self._record()
            self.finish_records("max_steps" if self.global_steps > self.total_training_steps else "epochs")

    def _record(self) -> None:
        """The metrics of the step before, which are whole when the next one begins."""
        if self._metrics is not None:
            self.record_metrics(self._metrics)
            self._metrics = None

    def _save_checkpoint(self) -> None:
        self.save_state()
        super()._save_checkpoint()

    def _load_checkpoint(self) -> Any:
        loaded = super()._load_checkpoint()
        self.begin_records()
        return loaded

    def _val_metrics_update(
        self, data_sources: Any, sample_uids: Any, infos: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self.record_evaluation(sample_uids, infos)
        return super()._val_metrics_update(data_sources, sample_uids, infos, *args, **kwargs)


class TaskRunner(BaseTaskRunner):
    """The process of the trainer, as verl's own, with hapo's worker and trainer in it."""

    def run(self, config: Any) -> None:
        """Train."""
        OmegaConf.resolve(config)
        self.add_actor_rollout_worker(config)
        for role in self.role_worker_mapping:
            self.role_worker_mapping[role] = ray.remote(HAPOWorker)
        self.add_reward_model_resource_pool(config)
        model: Any = omega_conf_to_dataclass(config.actor_rollout_ref.model)
        trainer = HAPORayTrainer(
            config,
            tokenizer=model.tokenizer,
            processor=model.processor,
            role_worker_mapping=self.role_worker_mapping,
            resource_pool_manager=self.init_resource_pool_mgr(config),
        )
        trainer.init_workers()
        trainer.fit()
