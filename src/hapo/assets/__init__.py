"""The embedded recipes, and two bundled models: a character-level Llama that adds numbers now and then, and one
that scores such answers.

They were made by ``scripts/make_tiny_model.py`` and ``scripts/make_reward_model.py``; the ``CARD.md`` beside each
says how and records its figures.
"""

from pathlib import Path

ASSETS = Path(__file__).parent


def tiny_model_path() -> Path:
    """Folder of the bundled model, for ``from_pretrained``."""
    return ASSETS / "tiny"


def reward_model_path() -> Path:
    """Folder of the bundled reward model, for ``from_pretrained``."""
    return ASSETS / "reward_tiny"


def embedded() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in ASSETS.glob("*.yaml"))
