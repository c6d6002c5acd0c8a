"""The embedded recipes, and the bundled tiny models, which add numbers now and then.

``tiny`` is a character-level Llama, made by ``scripts/make_tiny_model.py``; ``diffusion_tiny`` is a
masked-diffusion BERT, made by ``scripts/make_diffusion_model.py``. Their ``CARD.md`` says how, and has figures.
"""

from pathlib import Path

ASSETS = Path(__file__).parent


def tiny_model_path() -> Path:
    """Folder of the bundled model, for ``from_pretrained``."""
    return ASSETS / "tiny"


def diffusion_model_path() -> Path:
    """Folder of the bundled masked-diffusion model, for ``from_pretrained``."""
    return ASSETS / "diffusion_tiny"


MODELS = {"tiny": tiny_model_path(), "diffusion_tiny": diffusion_model_path()}
"""Name of each bundled model, as commands take it, and its folder."""


def embedded() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in ASSETS.glob("*.yaml"))
