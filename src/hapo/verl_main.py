"""verl's `main_ppo` for its trainer without a queue: `python -m hapo.verl_main trainer.use_v1=False ...`."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("VERL_USE_EXTERNAL_MODULES", "hapo.verl")  # for the processes that verl starts

import hydra
import ray
from verl.trainer.main_ppo import run_ppo
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config
from verl.utils.device import auto_set_device

from .engines.verl.ray_trainer import TaskRunner


@hydra.main(config_path="pkg://verl.trainer.config", config_name="ppo_trainer", version_base=None)
def main(config: Any) -> None:
    """Train, with verl's own configuration."""
    auto_set_device(config)
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    run_ppo(config, task_runner_class=ray.remote(TaskRunner))


if __name__ == "__main__":
    main()
