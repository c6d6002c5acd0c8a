"""HAPO and its siblings in TRL: drop-ins for `GRPOTrainer` and `SFTTrainer`, and for their configurations.

`HAPOTrainer` takes policy methods, `DiffusionTrainer` those of masked-diffusion models, `SupervisedTrainer`
supervised ones. `AuxiliaryLoss`, `Sampler` and `Scorer` are for subclasses of `HAPOTrainer`.
"""

from .engines.trl import (
    AuxiliaryLoss,
    DiffusionConfig,
    DiffusionTrainer,
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
    "HAPOConfig",
    "HAPOTrainer",
    "Sampler",
    "Scorer",
    "SupervisedConfig",
    "SupervisedTrainer",
]
