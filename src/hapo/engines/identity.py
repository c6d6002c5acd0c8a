"""What must agree for a resumed run to be the same run."""

from __future__ import annotations

import json
from typing import Any

from ..method import Method
from ..supervised import Supervised


def identity(method: Method | Supervised) -> dict[str, Any]:
    """Name and options of a method, as JSON gives them back."""
    return json.loads(json.dumps({"method": method.name, **method.options}))


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs, in words; empty where nothing does."""
    differing = sorted(k for k in {*there, *here} if there.get(k) != here.get(k))
    return ", ".join(f"{k}: {there.get(k)!r} there, {here.get(k)!r} here" for k in differing)
