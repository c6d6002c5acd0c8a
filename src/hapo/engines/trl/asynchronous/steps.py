"""From TRL's queue of samples to optimiser steps of whole groups, cut into micro-batches, ranks and passes.

TRL fills a micro-batch with whatever samples come next, and as many as fit. Here an optimiser step has a fixed
number of whole groups, because a method compares the answers of a group, and takes its statistics over the step.
How the step is then cut changes memory and speed alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from trl.experimental.async_grpo.async_grpo_trainer import DataCollatorForRollout, RolloutQueueDataset
from trl.experimental.async_grpo.packing import TreeRow
from trl.trainer.utils import pad

from .worker import UNKNOWN

Sample = dict[str, Any]
"""TRL's of one row of a conversation, with `response`, `column`, `turn` and `version` of its trained tokens."""

Response = list[Sample]
"""One conversation: its rows. Mostly one; a conversation that was rewritten between turns has more."""


class SeenQueue:
    """A queue that remembers what came last: TRL's data set yields a part of each sample."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue
        self.last: Any = None

    def get(self, timeout: float | None = None) -> Any:
        """The next sample, as of `queue.Queue`."""
        self.last = self.queue.get(timeout=timeout)
        return self.last

    def qsize(self) -> int:
        """Samples that wait."""
        return self.queue.qsize()


class WholeGroups(IterableDataset):
    """Micro-batches of optimiser steps, each of `groups` whole groups in the order in which they are complete.

    A micro-batch is a list of TRL's packed rows: of the first rank its passes, then of the next; every rank has as
    many responses, and as many passes.

    Args:
        source: TRL's, over `seen`; it drops what is too stale.
        seen: the queue.
        group_size: conversations of a group.
        groups: of an optimiser step.
        micro_batches: of an optimiser step.
        ranks: processes.
        budget: most tokens of a pass, each shared prefix once; a response alone may exceed it. 0: no limit.

    Raises:
        ValueError: a group has more samples than it can.
    """

    def __init__(
        self,
        source: RolloutQueueDataset,
        seen: SeenQueue,
        *,
        group_size: int,
        groups: int,
        micro_batches: int,
        ranks: int,
        budget: int,
    ) -> None:
        self.source, self.seen = source, seen
        self.group_size, self.groups = group_size, groups
        self.micro_batches, self.ranks, self.budget = micro_batches, ranks, budget

    def __iter__(self) -> Iterator[list[TreeRow]]:
        waiting: list[list[Response]] = []
        for group in self._complete():
            waiting.append(group)
            if len(waiting) == self.groups:
                responses = [response for group in waiting for response in group]
                yield from cut(responses, self.micro_batches, self.ranks, self.budget)
                waiting = []

    def _complete(self) -> Iterator[list[Response]]:
        """Groups, as their last sample comes."""
        pending: dict[int, list[tuple[Sample, Any]]] = {}
        done: set[int] = set()
        for sample in self.source:
            told, key = self.seen.last, sample["group_id"]
            if key in done:
                raise ValueError(
                    f"group {key} has more than its {self.group_size} samples: a rollout worker of your own that "
                    "makes several rows of a conversation must push hapo's WholeGroupSample, which says which are "
                    "one"
                )
            newest = self.source.model_version_fn()
            for old in [k for k, rows in pending.items() if self._stale(rows, newest)]:
                del pending[old]  # the rest of it is dropped by TRL's data set
            rows = pending.setdefault(key, [])
            rows.append((sample, told))
            if len(rows) == (getattr(told, "of_group", 0) or self.group_size):
                done.add(key)
                yield responses_of(pending.pop(key))

    def _stale(self, rows: list[tuple[Sample, Any]], newest: int) -> bool:
        return any(newest - told.model_version > self.source.max_staleness for _, told in rows)


def responses_of(rows: list[tuple[Sample, Any]]) -> list[Response]:
    """The conversations of a group, and in their samples what TRL's do not have.

    Args:
        rows: what TRL's data set yielded, and the sample that it was made of.
    """
    responses: dict[int, Response] = {}
    for number, (sample, told) in enumerate(rows):
        of_reward = {k: v for k, v in sample["metrics"].items() if k.startswith("reward")}
        # TRL logs what is left when the micro-batch is packed; rewards are logged with the step that learns of
        # them.
        sample["metrics"] = {k: v for k, v in sample["metrics"].items() if k not in of_reward}
        sample["reward"] = of_reward.pop("reward")
        sample["rewards"] = {k: v for k, v in of_reward.items() if k.startswith("rewards/")}
        responses.setdefault(getattr(told, "response", number), []).append(sample)
        versions = getattr(told, "versions", None)
        if versions is None:
            versions = np.full(len(sample["input_ids"]), told.model_version)
        sample["versions"] = versions
    for response in responses.values():
        column = turn = 0
        for sample in response:
            trained = sample["completion_mask"].astype(bool).copy()
            trained[:1] = False  # nothing predicts the first token
            begins = trained & ~np.concatenate([[False], trained[:-1]])
            sample["turn"] = (turn + begins.cumsum() - 1)[trained]
            sample["version"] = sample.pop("versions")[trained]
            sample["column"] = column + np.arange(trained.sum())
            column, turn = column + int(trained.sum()), turn + int(begins.sum())
    return list(responses.values())


def cut(responses: list[Response], micro_batches: int, ranks: int, budget: int) -> Iterator[list[TreeRow]]:
    """Micro-batches of an optimiser step; equally many responses for each rank in each of them."""
    size = len(responses) // (micro_batches * ranks)
    for first in range(0, len(responses), size * ranks):
        shares = [responses[first + rank * size :][:size] for rank in range(ranks)]
        for rank, share in enumerate(shares):
            for i, response in enumerate(share):
                for sample in response:
                    sample["response"], sample["number"] = i, first + rank * size + i
        parts = [passes(share, budget) for share in shares]
        most = max(map(len, parts))
        yield [packed(part) for share in parts for part in halved(share, most)]


def passes(responses: list[Response], budget: int) -> list[list[Response]]:
    """Responses of each pass, in their order."""
    parts: list[list[Response]] = [[]]
    row = TreeRow()
    for response in responses:
        beside = sum(len(sample["input_ids"]) for sample in response[1:])
        if budget and parts[-1] and not row.fits(response[0], budget - beside):
            parts.append([])
            row = TreeRow()
        parts[-1].append(response)
        for sample in response:
            row.add(sample)
    return parts


def halved(parts: list[list[Response]], most: int) -> list[list[Response]]:
    """The passes of a rank, as many as those of the others: a rank without one would leave them waiting."""
    parts = list(parts)
    while len(parts) < most:
        at = max(range(len(parts)), key=lambda i: len(parts[i]))
        middle = len(parts[at]) // 2
        parts[at : at + 1] = [parts[at][:middle], parts[at][middle:]]
    return parts


def packed(responses: list[Response]) -> TreeRow:
    """TRL's packed row of one pass."""
    row = TreeRow()
    for response in responses:
        for sample in response:
            row.add(sample)
    return row


class Collator:
    """TRL's collator, and of each loss term and response what a method reads.

    Per loss term (R, M), R packed rows: `response` in the share of its rank, `column` in the response, `turn`, and
    `version` of the weights. Per response (R, B), the same in all rows of a rank: `reward`, `group`, `number` in
    the step; `rewards` (R, B, K) of each function, where the samples tell.
    """

    def __init__(self, trls: DataCollatorForRollout, ranks: int) -> None:
        self.trls, self.ranks = trls, ranks
        self.names: list[str] = []
        """Of the K rewards, as the log has them."""

    def __call__(self, examples: list[list[TreeRow]]) -> dict[str, Tensor]:
        """The tensors of a micro-batch, rows of the first rank first."""
        (rows,) = examples
        batch = replace(self.trls, num_processes=len(rows))([rows])
        for name in ("response", "column", "turn", "version"):
            of_rows = [torch.cat([of_term(sample, name) for sample in row.samples]) for row in rows]
            batch[name] = pad(of_rows, padding_value=UNKNOWN)
        per_rank = len(rows) // self.ranks
        self.names = names = list(rows[0].samples[0]["rewards"])
        found: dict[str, list[Tensor]] = {"reward": [], "group": [], "number": [], "rewards": []}
        for rank in range(self.ranks):
            mine = rows[rank * per_rank : (rank + 1) * per_rank]
            samples = {sample["response"]: sample for row in mine for sample in row.samples}
            share = [samples[i] for i in sorted(samples)]
            values = {
                "reward": torch.tensor([sample["reward"] for sample in share]),
                "group": torch.tensor([sample["group_id"] for sample in share]),
                "number": torch.tensor([sample["number"] for sample in share]),
                "rewards": torch.tensor([[sample["rewards"][name] for name in names] for sample in share]),
            }
            for name, value in values.items():
                found[name] += [value] * per_rank
        batch |= {name: torch.stack(values) for name, values in found.items() if name != "rewards" or names}
        return batch


def of_term(sample: Sample, name: str) -> Tensor:
    """A figure of each trained token; of the whole sample where it is one number."""
    value = sample[name]
    if isinstance(value, int):
        return torch.full((len(sample["column"]),), value)
    return torch.from_numpy(np.asarray(value, dtype=np.int64))
