"""Text of completions."""

from __future__ import annotations

from typing import Any

Completion = str | list[dict[str, Any]]
"""What a model wrote: text, or the messages of a conversation."""


def text_of(completion: Completion) -> str:
    """The completion's text; of a conversation, that of the last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


def normalise(text: str) -> str:
    """Text for comparison by content: white space runs become one space, case is folded."""
    return " ".join(text.casefold().split())
