"""What the doctor reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a training run, or worth knowing about it."""

    name: str
    severity: Literal["error", "warning", "note"]
    """error: training cannot work, or did not; warning: it works otherwise than meant; note: worth knowing."""
    saw: str
    """What was seen, with its numbers."""
    why: str
    """Why it matters."""
    change: str
    """What to do: the option and a value."""


def percent(share: float) -> str:
    """A share as text: `37 %`; with a decimal below 10 %."""
    return f"{100 * share:.{0 if share == 0 or share >= 0.0995 else 1}f} %"
