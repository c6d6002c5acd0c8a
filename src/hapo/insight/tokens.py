"""Recorded tokens of a run too large to hold: read one rollout batch and some columns at a time, and aggregated.

What is exact only over all tokens at once (quantiles, ranks) keeps one packed number for each of them, 8 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

Read = Callable[[int, Sequence[str]], pd.DataFrame]


class Tokens:
    """The recorded tokens of some rollout batches.

    Args:
        counts: rollout batch, by its first optimiser step -> its tokens, above 0; in the order of training.
        columns: that any of them has.
        read: (rollout batch, columns) -> table by response, step and position, with those columns that it has.
    """

    def __init__(self, counts: dict[int, int], columns: Collection[str], read: Read) -> None:
        self.counts = counts
        self.columns = frozenset(columns)
        self._read = read

    @classmethod
    def of(cls, table: pd.DataFrame) -> Tokens:
        """Of a table in memory, with a column `rollout`, by rollout, response, step and position."""
        batches = {int(first): some for first, some in table.groupby("rollout")}
        counts = {first: len(some) for first, some in batches.items()}
        return cls(counts, list(table), lambda first, columns: batches[first][[*columns]])

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __contains__(self, column: object) -> bool:
        return column in self.columns

    @property
    def rollouts(self) -> list[int]:
        """First optimiser steps of the rollout batches."""
        return list(self.counts)

    def batch(self, rollout: int, *columns: str) -> pd.DataFrame:
        """These columns of one rollout batch, of those that any has; NaN where it lacks one that others have."""
        known = [name for name in dict.fromkeys(columns) if name in self.columns]
        return self._read(rollout, known).reindex(columns=known).reset_index(drop=True)

    def batches(self, *columns: str) -> Iterator[pd.DataFrame]:
        """These columns, a table for each rollout batch, in the order of training."""
        return (self.batch(rollout, *columns) for rollout in self.counts)

    def column(self, name: str) -> np.ndarray:
        """A column of all tokens, as float32."""
        return gather((batch[name].to_numpy() for batch in self.batches(name)), len(self), np.float32)


def gather(parts: Iterable[np.ndarray], shape: int | tuple[int, int], dtype: Any) -> np.ndarray:
    """The parts one behind the other, no longer than this shape, without a second copy of them."""
    whole, end = np.empty(shape, dtype), 0
    for part in parts:
        whole[end : end + len(part)] = part
        end += len(part)
    return whole[:end]


def parts_of(values: np.ndarray, parts: int) -> Iterator[np.ndarray]:
    """Places of float32 values in so many equal parts by size, the smallest first, ties in their order."""
    packed = _packed(_ordered(values), np.arange(len(values), dtype=np.uint32))
    packed.sort()
    ends = -(-np.arange(parts + 1) * len(values) // parts)
    return (_halves(packed[a:b])[1].astype(np.intp) for a, b in pairwise(ends))


def quantiles_by(
    parts: Iterable[tuple[np.ndarray, np.ndarray]], most: int, shares: Sequence[float]
) -> pd.DataFrame:
    """Exact quantiles of float32 values by a key, linear between the two order statistics around each.

    Args:
        parts: keys, whole numbers from 0, and as many values; NaN are left out.
        most: at most so many values come.
        shares: of the quantiles.

    Returns:
        A row for each key that has values: `count`, and a column for each share.
    """
    there = ((key[~np.isnan(values)], values[~np.isnan(values)]) for key, values in parts)
    packed = gather((_packed(key, _ordered(values)) for key, values in there), most, np.uint64)
    packed.sort()
    keys = np.arange(int(_halves(packed[-1:])[0][0]) + 1 if len(packed) else 0)
    starts = np.searchsorted(packed, _packed(keys, np.zeros(len(keys))))
    count = np.diff([*starts, len(packed)])
    found = pd.DataFrame({"count": count}, index=keys)[count > 0]
    start, last = starts[count > 0], count[count > 0] - 1
    for share in shares:
        place = share * last
        below = np.floor(place).astype(np.intp)
        a, b = (_values(packed[start + np.minimum(i, last)]) for i in (below, below + 1))
        with np.errstate(invalid="ignore"):  # of infinities
            found[share] = np.where(place == below, a, a + (b - a) * (place - below))
    return found


def _ordered(values: np.ndarray) -> np.ndarray:
    """Whole numbers of 32 bits in the order of these float32 values; zeros of either sign are equal."""
    bits = (np.ascontiguousarray(values, np.float32) + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _values(packed: np.ndarray) -> np.ndarray:
    """The values in the low halves, float64."""
    bits = np.ascontiguousarray(_halves(packed)[1])
    bits = np.where(bits >> 31, bits & np.uint32((1 << 31) - 1), ~bits)
    return bits.view(np.float32).astype(float)


def _packed(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """One number of 64 bits of two of 32, each from 0."""
    packed = np.empty(len(high), "<u8")
    for half, values in zip(_halves(packed), (high, low), strict=True):
        half[:] = values
    return packed


def _halves(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The high and the low halves, without a copy."""
    halves = packed.view("<u4").reshape(-1, 2)
    return halves[:, 1], halves[:, 0]
