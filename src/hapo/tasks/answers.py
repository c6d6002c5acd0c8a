"""Text of completions and the final answer in it."""

from __future__ import annotations

import re
from typing import Any

Completion = str | list[dict[str, Any]]
"""What a model wrote: text, or the messages of a conversation."""

ANSWER_PHRASE = re.compile(r"\banswer\s*:", re.IGNORECASE)


def text_of(completion: Completion) -> str:
    """The completion's text; of a conversation, that of the last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


def extract_answer(text: str) -> str:
    r"""The final answer in a text, stripped of surrounding white space.

    The first of these that occurs, and of several the last: what stands in ``<answer>...</answer>``, in
    ``\boxed{...}``, after ``####``, after ``answer:`` (any case); else the whole text.
    """
    start, end = text.rfind("<answer>"), text.rfind("</answer>")
    if 0 <= start < end:
        return text[start + len("<answer>") : end].strip()
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    if "####" in text:
        return text.rpartition("####")[2].strip()
    return ANSWER_PHRASE.split(text)[-1].strip()


def normalise(text: str) -> str:
    """Text for comparison by content: white space runs become one space, case is folded."""
    return " ".join(text.casefold().split())


def _last_boxed(text: str) -> str | None:
    opening = "\\boxed{"
    start = text.rfind(opening)
    if start < 0:
        return None
    start += len(opening)
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None
