"""HAPO and its siblings in TRL: drop-ins for `GRPOTrainer` and `SFTTrainer`, and for their configurations.

`HAPOTrainer` takes policy methods, `SupervisedTrainer` supervised ones. `AuxiliaryLoss`, `Sampler` and `Scorer`
are for subclasses of `HAPOTrainer`.
"""

from .engines.trl import (
    AuxiliaryLoss,
    HAPOConfig,
    HAPOTrainer,
    Sampler,
    Scorer,
    SupervisedConfig,
    SupervisedTrainer,
)

__all__ = [
    "AuxiliaryLoss",
    "HAPOConfig",
    "HAPOTrainer",
    "Sampler",
    "Scorer",
    "SupervisedConfig",
    "SupervisedTrainer",
]
