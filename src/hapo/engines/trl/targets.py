"""Token records of demonstrations: what a supervised method makes of the targets of some optimiser steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...batch import TokenBatch
from ...supervised import Supervised
from ..records import RunRecords
from .gates import recorded

IGNORED = -100


class TargetRecorder:
    """Feeds a run folder with the targets of some optimiser steps, scored in a pass of their own.

    The pass runs without gradients and dropout, so that training is the same with and without records; it gives
    ranks and expected ranks whatever the method reads.

    The model must have learnt to score (`attach_scoring`).

    Args:
        records: the open folder.
        method: that makes the weights.
        every: optimiser steps between records, besides the first; 0 records none.
        rows: demonstrations of a record, on all ranks together.
        rank, ranks: this process, of how many.
        decode: rows of token ids -> strings.
    """

    def __init__(
        self,
        records: RunRecords,
        method: Supervised,
        every: int,
        rows: int,
        rank: int,
        ranks: int,
        decode: Callable[[Sequence[Any]], list[str]],
    ) -> None:
        self.records, self.method, self.every = records, method, every
        self.rank, self.ranks, self.decode = rank, ranks, decode
        self.most = max(1, rows // ranks)
        self._micro_batches = 0
        self._held = 0

    def takes(self, step: int) -> bool:
        """Whether the targets of an optimiser step, from 1, are recorded."""
        return bool(self.every) and (step == 1 or step % self.every == 0)

    @torch.no_grad()
    def add(self, step: int, model: Any, inputs: dict[str, Any]) -> None:
        """Demonstrations of a micro-batch, the first ones. All ranks take part alike, since all run the model.

        Args:
            step: the optimiser step at work, from 1.
            model: with its wrappers.
            inputs: a micro-batch of TRL's, padded, packed or free of padding.
        """
        size = len(inputs["input_ids"])
        first, self._micro_batches = self._micro_batches * size, self._micro_batches + 1
        if first >= self.most:  # by the number of rows, which is the same on all ranks
            return
        ids, labels = inputs["input_ids"], inputs["labels"]
        targets, training = labels[:, 1:], model.training
        mask = targets != IGNORED
        request = {
            "tokens": targets,
            "mask": mask,
            "t_base": 1.0,
            "factor": None,
            "rank": True,
            "expected_rank": True,
        }
        passed = {name: x for name, x in inputs.items() if name != "labels"} | {"use_cache": False}
        model.eval()
        try:
            with recorded(model) as gates:
                scores = model(**passed, hapo_score=request)
        finally:
            model.train(training)
        fields: dict[str, Any] = {name: scores[name] for name in ("logp", "entropy", "rank", "expected_rank")}
        batch = TokenBatch(mask=mask, **fields)
        made = {**fields, "ids": targets, "mask": mask, "weight": self.method.loss(batch).tokens["weight"]}
        if gates is not None:
            made["gate"] = torch.sigmoid(gates.take()[:, :-1]).mean(-1)
        rows = [place for place in documents(inputs) if mask[place[0], place[1] : place[2] - 1].any()]
        rows = rows[: self.most - self._held]
        if not rows:
            return
        cut = [_targets(made, *place) for place in rows]
        width = max(len(one["mask"]) for one in cut)
        padded = {
            name: torch.stack([torch.nn.functional.pad(one[name], (0, width - len(one[name]))) for one in cut])
            for name in made
        }
        of_rows: dict[str, Any] = {name: padded[name] for name in fields}
        batch = TokenBatch(mask=padded["mask"], **of_rows)
        numbers = self.rank + self.ranks * (self._held + torch.arange(len(rows)))
        self._held += len(rows)
        self.records.add_targets(
            step,
            batch,
            padded["weight"],
            numbers,
            padded["ids"],
            [self.decode([[t] for t in row]) for row in padded["ids"].clamp_min(0).tolist()],
            self.decode([_prompt(ids[r, a:b], labels[r, a:b]) for r, a, b in rows]),
            padded.get("gate"),
        )

    def write(self, step: int) -> None:
        """At the end of a step."""
        self.records.write_tokens(step)
        self._micro_batches = self._held = 0


def documents(inputs: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Row, begin and end of each demonstration of a micro-batch: several a row where it is packed."""
    ids, position = inputs["input_ids"], inputs.get("position_ids")
    found = []
    for row in range(len(ids)):
        begins = [0] if position is None else (position[row] == 0).nonzero().flatten().tolist()
        found += [(row, a, b) for a, b in zip(begins, [*begins[1:], ids.shape[1]], strict=True)]
    return found


def _targets(made: dict[str, Tensor], row: int, begin: int, end: int) -> dict[str, Tensor]:
    """Of a demonstration, what stands between its first target and its last one."""
    mask = made["mask"][row, begin : end - 1]
    at = mask.nonzero().flatten()
    first, last = begin + int(at[0]), begin + int(at[-1]) + 1
    return {name: x[row, first:last] for name, x in made.items()}


def _prompt(ids: Tensor, labels: Tensor) -> list[int]:
    """The tokens before the first target."""
    return ids[: int((labels != IGNORED).nonzero()[0])].tolist()
