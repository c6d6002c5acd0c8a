"""The bundled tiny model: a character-level Llama that adds three-digit numbers now and then.

Made by ``scripts/make_tiny_model.py``; ``tiny/CARD.md`` says how and records its figures.
"""

from pathlib import Path


def tiny_model_path() -> Path:
    """Folder of the bundled model, for ``from_pretrained``."""
    return Path(__file__).parent / "tiny"
