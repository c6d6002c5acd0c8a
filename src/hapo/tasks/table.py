"""Rows as a data set that gives each of them back as it was written."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

from .files import Row

if TYPE_CHECKING:
    from datasets import Dataset


def dataset_of(rows: list[Row]) -> Dataset:
    """A data set of these rows, equal to them value by value and type by type.

    Arrow, in which `datasets` keeps a table, has one type a column: it fills objects with None for the keys that
    other rows have, makes 1 in a column with 2.5 the number 1.0, and refuses what has no common type. A column
    that it would change is kept as JSON text and read when a row or column is asked for (`with_transform`);
    `to_list` and `to_dict` would show that text.

    A column that a row lacks is None there. Raises ValueError, naming column and row, for a value that neither
    Arrow nor JSON can keep.
    """
    from datasets import Dataset

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in names}
    packed = [name for name, values in columns.items() if not _arrow_keeps(values)]
    for name in packed:
        columns[name] = [_pack(name, number, value) for number, value in enumerate(columns[name], 1)]
    dataset = Dataset.from_dict(columns)
    return dataset.with_transform(functools.partial(_unpack, packed)) if packed else dataset


def _arrow_keeps(values: list[Any]) -> bool:
    import pyarrow
    from datasets import Dataset

    try:
        kept = Dataset.from_dict({"values": values})[:]["values"]
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError):
        return False
    if repr(kept) == repr(values):  # 1 is not 1.0, and NaN is NaN
        return True
    try:
        json.dumps(values)
    except (TypeError, ValueError):
        return bool(kept == values)  # a time, whose zone Arrow gives another name
    return False


def _pack(name: str, number: int, value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"column {name!r}, row {number}: {value!r:.80} cannot be kept as it is ({error}); write it as text"
        ) from error


def _unpack(packed: list[str], batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {
        name: [json.loads(value) for value in values] if name in packed else values
        for name, values in batch.items()
    }
