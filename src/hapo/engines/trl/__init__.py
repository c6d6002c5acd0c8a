"""The TRL engine: TRL's GRPO trainer with the stages of a `Method`, its SFT trainer with a `Supervised`'s."""

from typing import Any

from ..version import require

require("trl")

from .auxiliary import AuxiliaryLoss  # noqa: E402
from .config import HAPOConfig  # noqa: E402
from .diffusion import DiffusionConfig, DiffusionTrainer  # noqa: E402
from .episodes import EnvironmentRollout  # noqa: E402
from .sampler import Sampler  # noqa: E402
from .scorer import Scorer  # noqa: E402
from .supervised import SupervisedConfig, SupervisedTrainer  # noqa: E402
from .trainer import HAPOTrainer  # noqa: E402

ASYNCHRONOUS = ("AsyncHAPOConfig", "AsyncHAPOTrainer", "DiskWeightTransfer")
"""Imported when they are read: they take TRL's experimental code, and vLLM where that is installed."""


def __getattr__(name: str) -> Any:
    """A name of the asynchronous trainer."""
    if name not in ASYNCHRONOUS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import asynchronous

    return getattr(asynchronous, name)


__all__ = [
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
