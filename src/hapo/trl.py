"""HAPO and its siblings in TRL: drop-ins for `GRPOTrainer` and `SFTTrainer`, and for their configurations.

`HAPOTrainer` takes policy methods, `DiffusionTrainer` those of masked-diffusion models, `SupervisedTrainer`
supervised ones. `AsyncHAPOTrainer` takes policy methods and rollouts that a vLLM server draws meanwhile, and
`DiskWeightTransfer` brings it weights without NCCL. `EnvironmentRollout` plays episodes of several turns.
`AuxiliaryLoss`, `Sampler` and `Scorer` are for subclasses of `HAPOTrainer`.
"""

from typing import Any

from .engines import trl as engine
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


def __getattr__(name: str) -> Any:
    """A name that is imported when it is read."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(engine, name)


__all__ = [  # noqa: F822
    "AsyncHAPOConfig",
    "AsyncHAPOTrainer",
    "AuxiliaryLoss",
    "DiffusionConfig",
    "DiffusionTrainer",
    "DiskWeightTransfer",
    "EnvironmentRollout",
    "HAPOConfig",
    "HAPOTrainer",
    "Sampler",
    "Scorer",
    "SupervisedConfig",
    "SupervisedTrainer",
]
