"""The TRL engine: TRL's GRPO trainer with the stages of a `Method`, its SFT trainer with a `Supervised`'s."""

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
