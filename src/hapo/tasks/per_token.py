"""What a reward function gives a completion: a number, None, or one number per token."""

from __future__ import annotations

import math
from typing import Any


def tokens_of(value: Any) -> list[Any] | None:
    """The rewards per token, of a list, a tuple or an array; None where the value is a single one, or none."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, (list, tuple)) else None


def outcome_of(value: Any) -> Any:
    """The reward of the completion: the sum of its rewards per token, or the value itself."""
    tokens = tokens_of(value)
    return value if tokens is None else math.fsum(tokens)


def is_number(value: Any) -> bool:
    """Whether a value is one finite number; text is none."""
    try:
        return not isinstance(value, (str, bytes)) and math.isfinite(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # no scalar, or one that is too large
        return False


def fault(tokens: list[Any], length: int) -> str | None:
    """What is wrong, in words, with these rewards of a completion of `length` tokens; None: nothing."""
    if len(tokens) != length:
        return f"returned a list of {len(tokens)} for a completion of {length} tokens"
    for place, value in enumerate(tokens):
        if not is_number(value):
            return f"returned {value!r:.80} for token {place} of {length}, not a finite number"
    return None
