"""Training problems in stages, as a file says that `hapo curriculum` or somebody else wrote."""

from __future__ import annotations

import logging
from collections import defaultdict

from .files import Row, read_local

logger = logging.getLogger(__name__)

STAGE = "stage"
"""Column with a problem's stage: a whole number, the smallest comes first."""


def in_stages(rows: list[Row], source: str) -> list[Row]:
    """The rows that the file `source` has, each with its stage; known again by question and answer.

    Rows that it does not have are left out, with a warning.

    Raises:
        ValueError: it lacks the columns question, answer and stage; a stage is no whole number; the rows have a
            column of this name already; or it has none of them.
    """
    waiting: dict[tuple[str, str], list[int]] = defaultdict(list)
    for file, table in read_local(source, "train").items():
        for number, row in enumerate(table, 1):
            stage = row.get(STAGE)
            if "question" not in row or "answer" not in row:
                raise ValueError(
                    f"{file}, row {number}: a curriculum has the columns question, answer and {STAGE}"
                )
            if isinstance(stage, bool) or not isinstance(stage, int):
                raise ValueError(f"{file}, row {number}: {STAGE} must be a whole number, got {stage!r:.80}")
            waiting[_key(row)].append(stage)
    staged = []
    for row in rows:
        if STAGE in row:
            raise ValueError(f"the training data have a column {STAGE!r}, which the curriculum makes: rename it")
        found = waiting.get(_key(row))
        if found:  # of equal problems each has its own stage, as long as there are
            staged.append(row | {STAGE: found.pop(0) if len(found) > 1 else found[0]})
    if not staged:
        raise ValueError(
            f"the curriculum {source} has none of the {len(rows)} training problems: make it by hapo curriculum "
            "with this recipe"
        )
    if len(staged) < len(rows):
        logger.warning(
            "%s: left out %d of %d training problems, which it does not have",
            source, len(rows) - len(staged), len(rows),
        )  # fmt: skip
    return staged


def _key(row: Row) -> tuple[str, str]:
    return str(row["question"]), str(row["answer"])
