"""The embedded recipes, and the bundled models: two that add numbers now and then, and one that scores answers.

``tiny`` is a character-level Llama, made by ``scripts/make_tiny_model.py``; ``diffusion_tiny`` is a
masked-diffusion BERT, made by ``scripts/make_diffusion_model.py``; ``reward_tiny`` scores, made by
``scripts/make_reward_model.py``. The ``CARD.md`` beside each says how and records its figures.
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
"""Name of each bundled model that commands train, as they take it, and its folder."""


def reward_model_path() -> Path:
    """Folder of the bundled reward model, for ``from_pretrained``."""
    return ASSETS / "reward_tiny"


def embedded() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in ASSETS.glob("*.yaml"))
