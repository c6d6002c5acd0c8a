"""verl's default trainer, synchronous and with its queue, with the advantage, loss and sampling of a `Method`.

What is overridden, and nothing else: the worker class, the client of the rollout servers (the temperature rule),
the advantage (it gets the entropies that verl computes and drops), the actor's update (it gets what was frozen),
checkpoints (statistics, and the count of optimiser steps), and what is recorded.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from omegaconf import open_dict
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from .config import NAME
from .driver import Driver
from .estimator import estimation
from .queue import QueueColumns
from .sampling import TemperedClient
from .worker import HAPOWorker


@register_trainer(NAME)
class HAPOTrainerSync(Driver, PPOTrainerSync):
    """`trainer.v1.trainer_mode=hapo`: verl's synchronous trainer with any `hapo.Method`; see `Driver`."""

    def __init__(self, config: Any) -> None:
        self.begin(config, queue=True)
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # verl asks for the name of its own
        super().__init__(config)
        self.start_tempering()

    # -- workers and rollout --------------------------------------------------------------------------------

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in list(self.role_worker_mapping):
            if str(role).startswith("actor"):
                self.role_worker_mapping[role] = ray.remote(HAPOWorker)

    def get_llm_client(self) -> Any:
        """verl's client; with an adaptive temperature one that sends the rule."""
        client = super().get_llm_client()
        return client if self.tempering is None else TemperedClient.of(client, self.tempering.board)

    def on_init_end(self) -> None:
        """As verl's; then the rollout servers are asked whether they apply rules."""
        super().on_init_end()
        self.check_rollout()

    def on_validate_begin(self) -> None:
        """Validation samples at its own temperature."""
        super().on_validate_begin()
        self.send_no_rule()

    def prepare_step(self) -> dict[str, Any]:
        """The rollout's prompts go out, with the statistics of the last one."""
        self.send_rule()
        return super().prepare_step()

    # -- advantage and update -------------------------------------------------------------------------------

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        columns = QueueColumns(batch)
        self.place_scores(columns)
        with estimation(self.method, self.known(columns)) as current:
            columns.batch = super()._compute_advantage(columns.batch, metrics)
        metrics.update(self.freeze(columns, current))
        return columns.batch

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        assert self._plan is not None
        QueueColumns(batch).tell(NAME, self._plan.to_dict())
        batch = super()._update_actor(batch, metrics)
        self.updated(len(batch), metrics)
        return batch

    # -- checkpoints and records ----------------------------------------------------------------------------

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
        """As verl's; its tokens and seconds are counted for the records."""
        began = time.perf_counter()
        batch = super().step(metrics, timing_raw)
        if self.records is not None:
            self.records.tokens += sum(tag["seq_len"] for tag in batch.tags if not tag.get("is_padding"))
            self.records.seconds += time.perf_counter() - began
        return batch

    def _save_checkpoint(self) -> None:
        self.save_state()
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        self.begin_records()

    def _val_metrics_update(
        self, data_sources: Any, sample_uids: Any, infos: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self.record_evaluation(sample_uids, infos)
        return super()._val_metrics_update(data_sources, sample_uids, infos, *args, **kwargs)

    def _compute_metrics(self, batch: Any, metrics: Any, timing_raw: Any, global_steps: int, epoch: Any) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)
        self.record_metrics(metrics)
        if global_steps >= self.total_training_steps:
            self.finish_records("max_steps")

    def on_train_end(self) -> None:
        """Reached where the epochs end before the steps, or a finished run is started again."""
        super().on_train_end()
        self.finish_records("max_steps" if self.global_steps > self.total_training_steps else "epochs")
