"""What travels from the trainer to the actors with each rollout batch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from ...batch import EntropyStats
from .config import NAME


@dataclass(frozen=True)
class RolloutPlan:
    """What the trainer tells the actors about a rollout batch, besides its tokens."""

    method: str
    options: dict[str, Any]
    step: int
    """First optimiser step of the rollout batch, from 1."""
    stats: EntropyStats | None
    """Of this rollout batch."""
    sampled_with: EntropyStats | None
    """That its tokens were drawn with; None: at T_base."""
    t_base: float
    responses: int
    """Rows of the rollout batch with a valid token."""
    record: str | None = None
    """Folder of the run, where the tokens of this rollout batch are recorded."""
    groups: int = 0
    """How many groups are recorded, the first ones."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, to travel with verl's data."""
        return asdict(self)

    @classmethod
    def of(cls, data: TensorDict) -> RolloutPlan:
        """The plan in verl's data.

        Raises:
            RuntimeError: there is none: another trainer than hapo's sent it.
        """
        told = tu.get_non_tensor_data(data, NAME, None)
        if told is None:
            raise RuntimeError("the actor of hapo got a batch from another trainer")
        stats = {name: told[name] and EntropyStats(**told[name]) for name in ("stats", "sampled_with")}
        return cls(**{**told, **stats})
