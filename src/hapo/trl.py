"""HAPO and its siblings in TRL: `HAPOTrainer` and `HAPOConfig`, drop-ins for `GRPOTrainer` and `GRPOConfig`.

`AuxiliaryLoss`, `Sampler` and `Scorer` are for subclasses of the trainer.
"""

from .engines.trl import AuxiliaryLoss, HAPOConfig, HAPOTrainer, Sampler, Scorer

__all__ = ["AuxiliaryLoss", "HAPOConfig", "HAPOTrainer", "Sampler", "Scorer"]
