"""A curriculum: the prompts stage after stage, shuffled inside a stage. Plumbing only."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from trl.trainer.utils import RepeatSampler

LOG = logging.getLogger(__name__)


class Stages:
    """The rows of a data set by their stage, in the order in which the stages come.

    Args:
        dataset: with a length, and the column.
        column: of whole numbers, the smallest first; with a minus before its name the largest.

    Raises:
        ValueError: a stream, no such column, or a stage that is no whole number.
    """

    def __init__(self, dataset: Any, column: str) -> None:
        self.column = column.removeprefix("-")
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "column_names"):
            raise ValueError(f"stage_column={column!r} orders a data set by index, and a stream has none")
        if self.column not in dataset.column_names:
            raise ValueError(
                f"stage_column={column!r}: the training data have no such column; they have "
                f"{', '.join(dataset.column_names)}"
            )
        values = dataset[self.column][:]
        for row, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(
                    f"stage_column={column!r}, row {row}: a stage is a whole number, not {value!r:.80}"
                )
        self.names = sorted(set(values), reverse=column.startswith("-"))
        self.rows = [[row for row, value in enumerate(values) if value == name] for name in self.names]

    def of(self, row: dict[str, Any]) -> int:
        """The place of a row's stage."""
        return self.names.index(row[self.column])

    def cuts(self, batches: int) -> list[int]:
        """The first of so many rollout batches of each stage, and their number: shares as of the prompts."""
        sizes = [len(rows) for rows in self.rows]
        return [0, *(round(batches * n / sum(sizes)) for n in accumulate(sizes))]

    def batch(self, number: int, batches: int, size: int, seed: int | None) -> list[int]:
        """The rows of one of so many rollout batches; without a seed they are not shuffled."""
        cuts = self.cuts(batches)
        stage = min(bisect_right(cuts, number) - 1, len(self.rows) - 1)
        rows, number = self.rows[stage], number - cuts[stage]
        if per_turn := len(rows) // size:  # what is left over waits for another turn, as in TRL
            turn, part = divmod(number, per_turn)
            places = [(turn, part * size + i) for i in range(size)]
        else:
            places = [divmod(number * size + i, len(rows)) for i in range(size)]
        if seed is None:
            return [rows[place] for _, place in places]
        return [rows[_shuffled(len(rows), seed, stage, turn)[place]] for turn, place in places]


@lru_cache(maxsize=8)
def _shuffled(n: int, seed: int, stage: int, turn: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed + 1_000_003 * stage + turn)
    order: list[int] = torch.randperm(n, generator=generator).tolist()
    return order


class StageSampler(RepeatSampler):
    """TRL's sampler in the order of the stages, a function of seed, epoch and the length of the training.

    Each stage gets a share of the training's rollout batches, in proportion to its prompts, and goes through its
    prompts as often as that takes; a rollout batch is of one stage.
    """

    def __init__(self, template: RepeatSampler, stages: Stages, trainer: Any) -> None:
        super().__init__(
            template.data_source,
            template.mini_repeat_count,
            template.batch_size,
            template.repeat_count,
            template.shuffle,
            template.seed,
        )
        self._stages, self._trainer = stages, trainer

    def __iter__(self) -> Iterator[int]:
        state, per_epoch = self._trainer.state, self.num_samples // self.batch_size
        batches = -(-state.max_steps // self._trainer.args.updates_per_rollout)
        cuts = self._stages.cuts(batches)
        empty = [str(name) for name, a, b in zip(self._stages.names, cuts[:-1], cuts[1:], strict=True) if a == b]
        if empty and not state.global_step:
            LOG.warning(f"{batches} rollout batches have none for stage {', '.join(empty)}: raise max_steps")
        first = int(state.epoch or 0) * per_epoch
        for number in range(first, first + per_epoch):
            rows = self._stages.batch(number, batches, self.batch_size, self.seed if self.shuffle else None)
            for _ in range(self.repeat_count):
                for row in rows:
                    yield from [row] * self.mini_repeat_count
