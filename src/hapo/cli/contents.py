"""What the inputs of a command hold, whatever they are called and wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from ..assets import MODELS
from ..outputs import content_hash, file_hash

FILES = (
    *(
        "config.json",
        "generation_config.json",
        "adapter_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ),
    *("*.safetensors", "*.bin", "*.index.json", "*.py", "tokenizer*", "vocab*", "merges.txt", "chat_template*"),
)
"""The files that make up a model, in its folder."""


def model_files(name: str | None) -> list[Path]:
    """Those of a local model; none of one on the Hub."""
    folder = MODELS.get(name or "") or Path(name or "").expanduser()
    return sorted({file for pattern in FILES for file in folder.glob(pattern)}) if name and folder.is_dir() else []


def model_identity(name: str, revision: str | None, trust_remote_code: bool) -> str:
    """The hash of a local model's files; name and commit of one on the Hub."""
    if files := model_files(name):
        return content_hash(files)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    return f"{name}@{config._commit_hash}"


def reward_files(names: Sequence[str]) -> list[tuple[str, Path | None]]:
    """Name of each reward function, and the file that holds it; None for what hapo has itself."""
    found: list[tuple[str, Path | None]] = []
    for name in names:
        where, _, function = name.rpartition(":")
        if where.endswith(".py"):
            found.append((function, Path(where).expanduser()))
            continue
        spec = None
        with suppress(ImportError, ValueError):  # whoever loads it says what is wrong
            spec = find_spec(where) if where else None
        found.append((name, Path(spec.origin) if spec and spec.has_location and spec.origin else None))
    return found


def reward_identity(names: Sequence[str]) -> list[str]:
    """Name of each reward function, with the hash of its file where it has one."""
    return [f"{name} of {file_hash(path)}" if path else name for name, path in reward_files(names)]
