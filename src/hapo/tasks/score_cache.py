"""Scores of masked completions and their attributions, kept across restarts: one SQLite file, plain numbers."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FILE = "attribution.sqlite"


class ScoreCache:
    """What a folder knows of one score function. Each `add` is on the disk when it returns.

    Args:
        folder: made if need be. Several score functions and several processes may share it.
        identity: of the score function, with all that a score depends on beside the tokens.

    Raises:
        ValueError: its file is no database, or one of somebody else's.
    """

    def __init__(self, folder: Path | str, identity: str) -> None:
        self._identity = identity
        file = Path(folder) / FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            # a guarded reward calls from a thread of its own, one at a time
            self._data = sqlite3.connect(file, timeout=60, check_same_thread=False)
            with self._data:
                self._data.execute(
                    "CREATE TABLE IF NOT EXISTS scores (identity TEXT, completion TEXT, mask BLOB, score REAL, "
                    "PRIMARY KEY (identity, completion, mask)) WITHOUT ROWID"
                )
                self._data.execute(
                    "CREATE TABLE IF NOT EXISTS results (identity TEXT, key TEXT, result TEXT, "
                    "PRIMARY KEY (identity, key)) WITHOUT ROWID"
                )
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{file} is no cache of attributions: {error}; move it or name another") from error

    def scores(self, completion: str) -> dict[bytes, float]:
        """Mask -> score of a completion, as far as it is known."""
        found = self._data.execute(
            "SELECT mask, score FROM scores WHERE identity = ? AND completion = ?", (self._identity, completion)
        )
        return {mask: math.nan if score is None else score for mask, score in found}  # SQLite has no NaN

    def add_scores(self, scores: Iterable[tuple[str, bytes, float]]) -> None:
        """Keep the scores of (completion, mask)."""
        rows = [(self._identity, *one) for one in scores]
        with self._data:
            self._data.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?)", rows)

    def result(self, key: str) -> dict[str, Any] | None:
        """What was kept under a key."""
        query = "SELECT result FROM results WHERE identity = ? AND key = ?"
        found = self._data.execute(query, (self._identity, key)).fetchone()
        return found and json.loads(found[0])

    def add_result(self, key: str, result: dict[str, Any]) -> None:
        """Keep a result under a key; numbers, texts, lists and mappings only."""
        with self._data:
            values = (self._identity, key, json.dumps(result))
            self._data.execute("INSERT OR REPLACE INTO results VALUES (?, ?, ?)", values)

    def close(self) -> None:
        """Close the file."""
        self._data.close()
