"""Rows of a data set: local files or folders of them, or a data set of the Hugging Face Hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from pathlib import Path
from typing import IO, Any, cast

Row = dict[str, Any]

SPLIT_NAMES = frozenset(
    {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
)
"""Words in the name of a file that say which split it holds."""

LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV field; Python's own limit of 131072 is shorter than some solutions."""


def is_local(source: str) -> bool:
    """Whether `source` names local data: it exists, or ends like a file that `read_file` reads."""
    path = Path(source).expanduser()
    return path.exists() or _suffix(path) in SUFFIXES


def set_name(source: str) -> str:
    """What the data are called: the name of the file without its ending, or of the folder."""
    path = Path(source)
    return path.name.removesuffix(path.name[-len(_suffix(path)) :]) if _suffix(path) in SUFFIXES else path.name


def read_local(source: str, split: str | None) -> dict[str, list[Row]]:
    """Rows by the name of the file that holds them: of one file, or of the files of a folder.

    Of a folder `split` takes the files whose names say so (train-00000.parquet, gsm8k_test.jsonl). Where no name
    says anything, all files are the split "train", and also what None stands for: "test" if there is one.

    Raises FileNotFoundError and ValueError as `read_file` does, and ValueError for a folder without data files,
    and for a split that it does not have.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        return {source: read_file(source)}
    return {str(file): read_file(str(file)) for file in files_of(path, split)}


def data_files(folder: Path) -> list[Path]:
    """The data files in a folder itself, in the order of their names."""
    return sorted(path for path in folder.iterdir() if _suffix(path) in SUFFIXES and path.is_file())


def files_of(folder: Path, split: str | None) -> list[Path]:
    """The files of a split of a folder; see `read_local`."""
    files = data_files(folder)
    if not files:
        inner = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise ValueError(
            f"the folder {folder} holds no data file (whose name ends in {', '.join(SUFFIXES)})"
            + (f"; name a folder in it: {', '.join(inner)}" if inner else "")
        )
    of_split = [file for file in files if (split or "test").lower() in _words(file)]
    if of_split:
        return of_split
    named = [file.name for file in files if _words(file) & SPLIT_NAMES]
    if split in (None, "train") and not named:
        return files
    raise ValueError(
        f"the folder {folder} has no file of the split {split or 'test'!r}: "
        + (f"its splits are in {', '.join(named)}" if named else "no name of its files says a split")
        + ". Set train_split and test_split to words in these names, or name a file"
    )


def read_file(source: str) -> list[Row]:
    """The rows of a local file, read as it is, without a cache or a network.

    Raises FileNotFoundError for a file that does not exist, ValueError for one of another kind or one that
    cannot be read, naming the line where there is one.
    """
    path = Path(source).expanduser()
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        raise ValueError(f"cannot read {source!r}; give a file whose name ends in {', '.join(SUFFIXES)}")
    if not path.exists():
        raise FileNotFoundError(f"data file {source!r} does not exist (looked at {path.resolve()})")
    reader = READERS[suffix.removesuffix(".gz")]
    if not suffix.endswith(".gz"):
        with path.open("rb") as file:
            return reader(file, path)
    try:
        with gzip.open(path, "rb") as unpacked:
            return reader(cast(IO[bytes], unpacked), path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from error


def read_hub(name: str, config: str | None, split: str) -> list[Row]:
    """The rows of one split of a Hub data set; code that a data set may carry is never run."""
    import datasets

    return list(datasets.load_dataset(name, config, split=split))


def _suffix(path: Path) -> str:
    """The ending that tells the kind of a file, in small letters: of a.jsonl.gz both."""
    return re.search(r"(\.\w+)?(\.gz)?$", path.name.lower())[0]  # type: ignore[index]


def _words(file: Path) -> set[str]:
    return set(re.split(r"[-_. ]+", file.name.lower()))


def _read_jsonl(file: IO[bytes], path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(file, 1):
        text = line.removeprefix(b"\xef\xbb\xbf")
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: malformed JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected an object, found {line[:60]!r}")
        rows.append(row)
    return rows


def _read_json(file: IO[bytes], path: Path) -> list[Row]:
    try:
        rows = json.loads(file.read())
    except ValueError as error:
        raise ValueError(f"{path}: malformed JSON ({error}); use .jsonl for one object a line") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects")
    return rows


def _read_csv(file: IO[bytes], path: Path) -> list[Row]:
    kind = "TSV" if ".tsv" in _suffix(path) else "CSV"
    before = csv.field_size_limit(LONGEST_FIELD)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    lines = csv.reader(text, strict=True, delimiter="\t" if kind == "TSV" else ",")
    rows: list[Row] = []
    header: list[str] | None = None
    try:
        for fields in lines:
            if not fields:
                continue
            if header is None:
                header = fields
                doubled = sorted({name for name in header if header.count(name) > 1})
                if doubled:
                    raise ValueError(f"the header names {', '.join(map(repr, doubled))} more than once")
                continue
            if len(fields) != len(header):
                few = "more" if len(fields) > len(header) else "fewer"
                raise ValueError(f"{few} fields than the {len(header)} of the header")
            rows.append(dict(zip(header, fields, strict=True)))
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}, line {lines.line_num}: malformed {kind} ({error})") from error
    finally:
        csv.field_size_limit(before)
        text.detach()  # the file is its opener's to close
    return rows


def _read_parquet(file: IO[bytes], path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: malformed Parquet ({error})") from error


READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
SUFFIXES = (*READERS, *(f"{suffix}.gz" for suffix in READERS if suffix != ".parquet"))
"""How the names of readable files end."""
