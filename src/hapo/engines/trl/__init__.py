"""The TRL engine: TRL's GRPO trainer with the advantage, loss, scoring and sampling of a `Method`."""

from ..version import require

require("trl", "1.16")

from .auxiliary import AuxiliaryLoss  # noqa: E402
from .config import HAPOConfig  # noqa: E402
from .sampler import Sampler  # noqa: E402
from .scorer import Scorer  # noqa: E402
from .trainer import HAPOTrainer  # noqa: E402

__all__ = ["AuxiliaryLoss", "HAPOConfig", "HAPOTrainer", "Sampler", "Scorer"]
