"""verl's SFT trainer with a supervised method: `torchrun -m hapo.verl_sft +hapo.method=dft ...`."""

from __future__ import annotations

from typing import Any

import hydra
from omegaconf import OmegaConf
from verl.utils.device import auto_set_device, get_device_name
from verl.utils.distributed import (
    destroy_global_process_group,
    initialize_global_process_group,
    initialize_global_process_group_ray,
)

from .engines.verl.sft import SupervisedSFTTrainer, supervised_of


@hydra.main(config_path="pkg://verl.trainer.config", config_name="sft_trainer_engine", version_base=None)
def main(config: Any) -> None:
    """Train, with verl's own configuration."""
    auto_set_device(config)
    supervised_of(OmegaConf.to_container(config))
    if get_device_name() == "cpu":  # for which verl would name gloo twice
        initialize_global_process_group_ray(backend="cpu:gloo")
    else:
        initialize_global_process_group()
    SupervisedSFTTrainer(config).fit()
    destroy_global_process_group()


if __name__ == "__main__":
    main()
