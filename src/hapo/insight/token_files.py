"""The Parquet files of recorded tokens: one rollout batch, some columns, some responses at a time."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

KEYS = ("response", "step", "position")
"""Columns that order the tokens of a rollout batch."""


@dataclass(frozen=True)
class TokenFile:
    """A file of tokens: an optimiser step of a rollout batch, of one rank."""

    path: Path
    rollout: int
    """First optimiser step of the rollout batch."""
    rows: int
    columns: list[str]
    strings: list[str]
    """Columns of strings, which repeat: they are read as dictionaries."""
    told: dict[bytes, bytes]
    """What the file says of the rollout batch."""

    @classmethod
    def of(cls, path: Path) -> TokenFile:
        """Of the foot of the file alone; files of an earlier version tell their rollout batch in a row."""
        file = pq.ParquetFile(path)
        schema, told = file.schema_arrow, file.schema_arrow.metadata or {}
        rollout = told.get(b"rollout")
        if rollout is None:
            rollout = file.read_row_group(0, columns=["rollout"])["rollout"][0].as_py()
        strings = [x.name for x in schema if pa.types.is_string(x.type) or pa.types.is_large_string(x.type)]
        return cls(path, int(rollout), file.metadata.num_rows, schema.names, strings, told)

    def read(self, columns: Collection[str], responses: pa.Array | None) -> Iterator[pa.Table]:
        """These columns, of those that it has, a row group at a time."""
        file = pq.ParquetFile(self.path, read_dictionary=self.strings)
        for number in range(file.num_row_groups):
            table = file.read_row_group(number, columns=[name for name in self.columns if name in columns])
            if responses is not None:
                table = table.filter(pc.is_in(table["response"], responses))
            yield table.replace_schema_metadata(None)


class TokenFiles:
    """The files of tokens of a run, by step and rank."""

    def __init__(self, folder: Path) -> None:
        self.files = [TokenFile.of(path) for path in sorted(folder.glob("step-*.parquet"))]
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def of(self, rollout: int) -> list[TokenFile]:
        """Those of a rollout batch."""
        return [file for file in self.files if file.rollout == rollout]

    def read(
        self, rollout: int, columns: Sequence[str] | None = None, responses: Collection[int] | None = None
    ) -> pa.Table:
        """A rollout batch by response, step and position: of all columns and responses, or of some.

        Strings are dictionaries. A column that the rollout batch lacks is left out.
        """
        wanted = {name for file in self.of(rollout) for name in file.columns if columns is None or name in columns}
        if responses is not None:
            table = self._unordered(rollout, wanted.union(KEYS), pa.array(responses, pa.int64()))
            return table.take(_order(table)).select([name for name in table.column_names if name in wanted])
        if rollout not in self._orders:
            self._orders[rollout] = _runs(_order(self._unordered(rollout, KEYS)))
        first, length = self._orders[rollout]
        bare = any(wanted.isdisjoint(file.columns) for file in self.of(rollout))  # it has rows all the same
        table = self._unordered(rollout, wanted.union(KEYS[:1]) if bare else wanted)
        table, ends = table.select([name for name in table.column_names if name in wanted]), length.cumsum()
        return (
            table
            if len(first) == 1
            else table.take(np.repeat(first - ends + length, length) + np.arange(ends[-1]))
        )

    def responses(self, rollout: int) -> int | None:
        """Of the whole rollout batch, those recorded or not whose rewards count; None where nothing says so."""
        told = self.of(rollout)[0].told.get(b"responses")
        return None if told is None else int(told)

    def without_tokens(self, rollout: int) -> list[list[float]]:
        """Responses without a valid token: [response, group, reward, verdict], each once, whatever its steps."""
        lines = [line for file in self.of(rollout) for line in json.loads(file.told.get(b"without_tokens", b"[]"))]
        return list({int(line[0]): line for line in lines}.values())

    def _unordered(self, rollout: int, columns: Collection[str], responses: pa.Array | None = None) -> pa.Table:
        pieces = [piece for file in self.of(rollout) if file.rows for piece in file.read(columns, responses)]
        return pa.concat_tables(pieces, promote_options="default").unify_dictionaries().combine_chunks()


def _order(table: pa.Table) -> np.ndarray:
    return np.lexsort([table[name].to_numpy() for name in reversed(KEYS)])


def _runs(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers as runs of neighbours: first ones and lengths. Training writes a response in one piece."""
    begins = np.flatnonzero(np.diff(order, prepend=-2) != 1)
    return order[begins], np.diff(begins, append=len(order))
