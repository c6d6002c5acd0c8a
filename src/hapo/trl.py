"""HAPO and its siblings in TRL: drop-ins for `GRPOTrainer` and `SFTTrainer`, and for their configurations.

`HAPOTrainer` takes policy methods, `DiffusionTrainer` those of masked-diffusion models, `SupervisedTrainer`
supervised ones. `EnvironmentRollout` plays episodes of several turns. `AuxiliaryLoss`, `Sampler` and `Scorer` are
for subclasses of `HAPOTrainer`.
"""

from .engines.trl import (
    AuxiliaryLoss,
    DiffusionConfig,
    DiffusionTrainer,
    EnvironmentRollout,
    HAPOConfig,
    HAPOTrainer,
    Sampler,
    Scorer,
    SupervisedConfig,
    SupervisedTrainer,
)

__all__ = [
    "AuxiliaryLoss",
    "DiffusionConfig",
    "DiffusionTrainer",
    "EnvironmentRollout",
    "HAPOConfig",
    "HAPOTrainer",
    "Sampler",
    "Scorer",
    "SupervisedConfig",
    "SupervisedTrainer",
]
