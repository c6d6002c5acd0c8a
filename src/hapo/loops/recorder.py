"""Run records of ETPO: the tokens of some updates, with what the critic says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..engines.records import RunRecords
from .turns import AgentTurn, Segment


class TurnRecorder:
    """Feeds a run folder with the turns of some updates.

    Each turn is a response; its prompt is its episode up to the first turn that the update has of it. What the
    environment answered stands behind the last token of each turn.

    Args:
        records: the open folder.
        every: updates between records, besides the first; 0: none.
        rows: turns of a record, at most, of the agents with the lowest numbers.
        turns: that an agent takes before an update.
        decode: rows of token ids -> strings.
    """

    def __init__(
        self, records: RunRecords, *, every: int, rows: int, turns: int, decode: Callable[[Any], list[str]]
    ) -> None:
        self.records, self.every, self.agents, self.turns = records, every, max(1, rows // turns), turns
        self.decode = decode
        self._taken: dict[int, int] = {}

    def takes(self, step: int) -> bool:
        """Whether an update, from 1, is one to record."""
        return bool(self.every) and (step == 1 or step % self.every == 0)

    def add(self, step: int, segments: Sequence[Segment], states: Any) -> None:
        """The turns of some segments; `states` are numbers of each of their tokens, in order, by name."""
        at = 0
        for segment in segments:
            begins = [turn.start for turn in segment.turns]
            for turn, until in zip(segment.turns, [*begins[1:], len(segment.ids)], strict=True):
                n, number = len(turn.ids), self._taken.get(segment.agent, 0)
                self._taken[segment.agent] = number + 1
                if n and segment.agent < self.agents:
                    of_turn = {name: x[at : at + n].numpy() for name, x in states.items()}
                    said = segment.ids[turn.start + n : until]
                    self._add(step, segment, turn, said, segment.agent * self.turns + number, of_turn)
                at += n

    def write(self, step: int) -> None:
        """At the end of an update."""
        self._taken.clear()
        self.records.write_tokens(step)

    def _add(
        self,
        step: int,
        segment: Segment,
        turn: AgentTurn,
        said: list[int],
        response: int,
        numbers: dict[str, np.ndarray],
    ) -> None:
        n = len(turn.ids)
        answer = self.decode([said])[0] if said else None
        texts, others = (self.decode([[int(t)] for t in ids]) for ids in (turn.ids, numbers["other"]))
        same = {"response": response, "group": segment.agent, "reward": turn.reward, "verdict": turn.reward}
        self.records.add_columns(
            step,
            {
                "position": np.arange(n),
                "prompt": [segment.prompt] * n,
                **{name: np.full(n, value) for name, value in same.items()},
                "text": texts,
                "said": pa.array([None] * (n - 1) + [answer], pa.string()),
                "id": np.array(turn.ids),
                **numbers,
                "other_text": others,
                "advantage": numbers["q"] - numbers["value"],
                "clipped": np.zeros(n, bool),
                "kept": np.ones(n, bool),
            },
        )
