"""Rows of a data set: local JSONL, JSON, Parquet and CSV files, or a data set of the Hugging Face Hub."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def is_local(source: str) -> bool:
    """Whether `source` names a local file: it exists, or ends like one that `read_file` reads."""
    path = Path(source).expanduser()
    return path.exists() or path.suffix.lower() in READERS


def read_file(source: str) -> list[Row]:
    """The rows of a local file, read as it is, without a cache or a network.

    Raises FileNotFoundError for a file that does not exist, ValueError for one of another kind or one that
    cannot be read, naming the line where there is one.
    """
    path = Path(source).expanduser()
    reader = READERS.get(path.suffix.lower())
    if reader is None or path.is_dir():
        raise ValueError(f"cannot read {source!r}; give a file whose name ends in {', '.join(READERS)}")
    if not path.exists():
        raise FileNotFoundError(f"data file {source!r} does not exist (looked at {path.resolve()})")
    return reader(path)


def read_hub(name: str, config: str | None, split: str) -> list[Row]:
    """The rows of one split of a Hub data set; code that a data set may carry is never run."""
    import datasets

    return list(datasets.load_dataset(name, config, split=split))


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: malformed JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected an object, found {line[:60]!r}")
            rows.append(row)
    return rows


def _read_json(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: malformed JSON ({error}); use .jsonl for one object a line") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects")
    return rows


def _read_csv(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        rows = []
        try:
            for row in reader:
                if None in row:
                    raise ValueError(f"more fields than the {len(reader.fieldnames or ())} of the header")
                rows.append(row)
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{path}, line {reader.reader.line_num}: malformed CSV ({error})") from error
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: malformed Parquet ({error})") from error


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv}
