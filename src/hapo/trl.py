"""HAPO and its siblings in TRL: `HAPOTrainer` and `HAPOConfig`, drop-ins for `GRPOTrainer` and `GRPOConfig`."""

from .engines.trl import HAPOConfig, HAPOTrainer

__all__ = ["HAPOConfig", "HAPOTrainer"]
