"""A page of answers coloured by channels of attribution: which tokens made the score, by each channel and mixed.

The microscope shows the same of a run whose token records have columns `attribution_NAME`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..outputs import write_page
from .figures import short
from .page import new_nonce, render
from .token_figures import visible

STEPS = 10
"""Depths of colour on each side of 0."""


@dataclass(frozen=True)
class Answer:
    """An answer of T tokens, with a number a token in each channel."""

    prompt: str
    tokens: list[str]
    """A string a token."""
    score: float
    right: bool
    channels: dict[str, list[float]]
    """Name -> T numbers; of a mixture as of a channel. One with a number that is not finite has no colour."""


def write_attributions(answers: Sequence[Answer], output: Path | str, *, replace: bool = False) -> Path:
    """Write the page, and return its path: answers by their prompt, the right ones first, a line a channel.

    Blue raises the score and orange lowers it, the deeper the more; a channel has one scale over the whole page. An
    older page of these answers, if unchanged, gives way. Text is untrusted, and is escaped.

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
    most = {
        name: max((abs(x) for a in answers for x in a.channels[name] if math.isfinite(x)), default=0.0)
        for name in names
    }
    groups: dict[str, list[Answer]] = {}
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
            (visible(prompt), [_drawn(one, most) for one in sorted(some, key=lambda one: not one.right)])
            for prompt, some in groups.items()
        ],
    )
    of = hashlib.sha256(json.dumps([asdict(answer) for answer in answers]).encode()).hexdigest()
    write_page(Path(output), html, of, replace)
    return Path(output)


def _drawn(answer: Answer, most: dict[str, float]) -> dict[str, Any]:
    """An answer for the template: of each channel, text, number and class of colour of each token."""
    texts = [visible(token) for token in answer.tokens]
    lines = [
        (name, sum(row), [(text, short(x), _colour(x, most[name])) for text, x in zip(texts, row, strict=True)])
        for name, row in answer.channels.items()
    ]
    return {"right": answer.right, "score": short(answer.score), "lines": lines}


def _colour(x: float, most: float) -> str:
    """Its class in the style sheet: side and depth."""
    depth = round(STEPS * abs(x) / most) if most and math.isfinite(x) else 0
    return f"{'p' if x > 0 else 'n'} k{depth}" if depth else ""
