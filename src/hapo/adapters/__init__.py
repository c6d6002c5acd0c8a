"""Adapters that act on single tokens, on unmodified PEFT. Importing this package makes them known to PEFT."""

from .config import GateRAConfig
from .gates import Gates, add_gate_loss, gate_entropy, record_gates
from .model import GateRAModel

__all__ = [
    "GateRAConfig",
    "GateRAModel",
    "Gates",
    "add_gate_loss",
    "gate_entropy",
    "record_gates",
]
