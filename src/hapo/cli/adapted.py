"""Models that are adapters of this library's own types."""

from __future__ import annotations

import json
from pathlib import Path


def know_adapter(path: str) -> None:
    """Make PEFT know the adapter in this folder, where it is one of ours; transformers then opens it by itself."""
    file = Path(path) / "adapter_config.json"
    if file.is_file() and json.loads(file.read_text()).get("peft_type") == "GATERA":
        from .. import adapters  # noqa: F401 (the import is what is wanted)
