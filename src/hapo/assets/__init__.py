"""The embedded recipes, and the bundled tiny model: a character-level Llama that adds numbers now and then.

The model was made by ``scripts/make_tiny_model.py``; ``tiny/CARD.md`` says how and records its figures.
"""

from pathlib import Path

ASSETS = Path(__file__).parent


def tiny_model_path() -> Path:
    """Folder of the bundled model, for ``from_pretrained``."""
    return ASSETS / "tiny"


def diffusion_model_path() -> Path:
    """Folder of the bundled masked-diffusion model, for ``from_pretrained``."""
    return ASSETS / "diffusion_tiny"


def embedded() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in ASSETS.glob("*.yaml"))
