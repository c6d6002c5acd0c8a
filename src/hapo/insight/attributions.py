"""A page of answers coloured by channels of attribution: which tokens made the score, by each channel and mixed.

The microscope shows the same of a run whose token records have columns `attribution_NAME`, which
`record_attributions` adds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..outputs import write_page, write_whole
from ..tasks.attribution import Attribution
from .figures import short, visible
from .microscope import ATTRIBUTION
from .page import new_nonce, render

STEPS = 10
"""Depths of colour on each side of 0."""


@dataclass(frozen=True)
class AttributedAnswer:
    """An answer of T tokens, with a number a token in each channel."""

    prompt: str
    tokens: list[str]
    """A string a token."""
    score: float
    right: bool
    channels: dict[str, list[float]]
    """Name -> T numbers; of a mixture as of a channel. One with a number that is not finite has no colour."""


def write_attributions(answers: Sequence[AttributedAnswer], output: Path | str, *, replace: bool = False) -> Path:
    """Write the page, and return its path: answers by their prompt, the right ones first, a line a channel.

    Blue raises the score and orange lowers it, the deeper the more; a channel has one scale over the whole page.
    An older page of these answers, if unchanged, gives way. Text is untrusted, and is escaped.

    Args:
        answers: all with the same channels.
        output: the .html file.
        replace: write over whatever file is there.

    Raises:
        ValueError: no answer, or one whose channels are not those of the first or not as long as it.
        FileExistsError: another file is there, the page of other answers, or one that was changed.
        OSError: the page cannot be written there.
    """
    if not answers:
        raise ValueError("a page of attributions needs an answer")
    names = list(answers[0].channels)
    for place, answer in enumerate(answers):
        if list(answer.channels) != names:
            raise ValueError(f"answer {place} has the channels {list(answer.channels)}, the first one {names}")
        for name, row in answer.channels.items():
            if len(row) != len(answer.tokens):
                raise ValueError(f"answer {place}: {len(row)} numbers of {name} for {len(answer.tokens)} tokens")
    every = {name: [abs(x) for answer in answers for x in answer.channels[name]] for name in names}
    most = {name: max(filter(math.isfinite, row), default=0.0) for name, row in every.items()}
    groups: dict[str, list[AttributedAnswer]] = {}
    for answer in answers:
        groups.setdefault(answer.prompt, []).append(answer)
    html = render(
        "attributions.html",
        title="Attributions",
        nonce=new_nonce(),
        figures=[],
        channels=names,
        steps=range(-STEPS, STEPS + 1),
        prompts=[
            (
                visible(prompt, 400, marks=False),
                [_drawn(one, most) for one in sorted(some, key=lambda one: not one.right)],
            )
            for prompt, some in groups.items()
        ],
    )
    of = hashlib.sha256(json.dumps([asdict(answer) for answer in answers]).encode()).hexdigest()
    write_page(Path(output), html, of, replace)
    return Path(output)


def record_attributions(
    folder: Path | str,
    attribution: Attribution,
    encode: Callable[[str], Sequence[int]],
    weights: Mapping[str, float] | None = None,
) -> list[str]:
    """Add the channels to the token records of a run, for the microscope; return the names of the columns.

    They stand in `attribution_NAME`, and their mixture by `weights` in `attribution_mixture`, float32; columns of
    these names give way. The completion is what is recorded of it: output of tools is not part of it.

    Args:
        folder: of the run.
        attribution: of a score that reads the policy's token ids.
        encode: prompt text -> token ids.
        weights: channel -> weight; None records no mixture.

    Raises:
        ValueError: the run recorded no tokens, or a weight is for no channel.
        OSError: a file cannot be written; each is whole, old or new.
    """
    files = sorted((Path(folder) / "tokens").glob("step-*.parquet"))
    if not files:
        raise ValueError(f"{folder} recorded no tokens: train with record_tokens_every above 0")
    names = [*attribution.channels, *(["mixture"] if weights is not None else [])]
    for file in files:
        table = pq.ParquetFile(file).read()
        frame = table.to_pandas()
        rows = [some.sort_values("position") for _, some in frame.groupby(["response", "step"], sort=False)]
        prompts = [list(encode(some["prompt"].iloc[0])) for some in rows]
        found = attribution(prompts, [some["id"].tolist() for some in rows])
        for name in names:
            column = pd.Series(0.0, index=frame.index)
            for some, one in zip(rows, found, strict=True):
                column[some.index] = one.channels[name] if name in one.channels else one.mixture(weights or {})
            values = pa.array(column.to_numpy(), pa.float32(), from_pandas=False)
            kept = [x for x in table.column_names if x != ATTRIBUTION + name]
            table = table.select(kept).append_column(ATTRIBUTION + name, values)
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        write_whole(file, buffer.getvalue().to_pybytes())
    return [ATTRIBUTION + name for name in names]


def _wrong(answer: AttributedAnswer) -> bool:
    return not answer.right


def _drawn(answer: AttributedAnswer, most: dict[str, float]) -> dict[str, Any]:
    """An answer for the template: of each channel, text, number and class of colour of each token."""
    texts = [visible(token) for token in answer.tokens]
    lines = [
        (
            visible(name),
            sum(row),
            [(text, short(x), _colour(x, most[name])) for text, x in zip(texts, row, strict=True)],
        )
        for name, row in answer.channels.items()
    ]
    return {"right": answer.right, "score": short(answer.score), "lines": lines}


def _colour(x: float, most: float) -> str:
    """Its class in the style sheet: side and depth."""
    depth = round(STEPS * abs(x) / most) if most and math.isfinite(x) else 0
    return f"{'p' if x > 0 else 'n'} k{depth}" if depth else ""
