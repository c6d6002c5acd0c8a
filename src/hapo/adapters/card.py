"""What an adapter is called and where it comes from, as the options class of a method says it of a method."""

from __future__ import annotations

from dataclasses import dataclass

from ..methods import Paper


@dataclass(frozen=True)
class AdapterCard:
    """One adapter."""

    name: str
    summary: str
    paper: Paper
    config: str
    """Its PEFT config: module and class."""
    kind: str = "adapter"


GATERA = AdapterCard(
    name="gatera",
    summary="a sigmoid gate per adapted layer and token scales the adapter's branch",
    paper=Paper("GateRA: Token-Aware Modulation for Parameter-Efficient Fine-Tuning", "2511.17582", 2025),
    config="hapo.adapters.GateRAConfig",
)
