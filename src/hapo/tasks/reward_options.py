"""What the option `token_reward` of a recipe says; light, for those who only read recipes."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..assets import reward_model_path

if TYPE_CHECKING:
    from .reward_model import RewardModel

CHANNELS = ("shap", "lime", "attention", "sparse")
"""Those of `attribution`."""

EMBEDDED = "reward_tiny"
"""The name of the bundled reward model in a recipe."""

NORMALISATIONS = {"shap": "sum", "lime": "softmax", "attention": "sum"}
"""How the row of a channel is brought to the sum 1, unless told."""


@dataclass(frozen=True, kw_only=True)
class TokenRewardOptions:
    """What the option `token_reward` of a recipe says.

    Raises:
        ValueError: an unknown channel, mode or normalisation, weights that are no shares, a size below its least.
    """

    model: str
    """Sequence-classification model with the policy's tokenizer: folder, Hub id, or reward_tiny (bundled)."""
    channels: Sequence[str] = ("shap", "lime", "sparse")
    """What the score is spread by: shap, lime, attention, and sparse, all on the last token."""
    weights: Sequence[float] | None = None
    """Share of each channel, >= 0, of sum 1. None: `hapo shape` finds them."""
    mode: Literal["normalised", "additive"] = "normalised"
    """Whether the rewards of an answer add up to its score, or to what the channels explain of it."""
    normalisation: Mapping[str, str] | None = None
    """Channel -> sum, softmax or abs, in the mode normalised; unless told, softmax for lime and sum for others."""
    samples: int = 256
    """Masked answers that each of shap and lime may score, per answer."""
    batch_size: int = 256
    """Answers in one pass of the reward model."""
    seed: int = 0
    """Of the masks that are drawn."""
    cache: str | None = None
    """Folder that keeps attributions across restarts and runs; None keeps none."""

    def __post_init__(self) -> None:
        for name in ("channels", "weights"):
            value = getattr(self, name)
            if isinstance(value, str) or (not isinstance(value, Sequence) and (value, name) != (None, "weights")):
                raise ValueError(f"token_reward: {name} must be a list, got {value!r}")
        if not isinstance(self.normalisation, Mapping | None):
            raise ValueError(f"token_reward: normalisation must map channels, got {self.normalisation!r}")
        if not isinstance(self.cache, str | None):
            raise ValueError(f"token_reward: cache must name a folder, got {self.cache!r}")
        channels = list(self.channels)
        if unknown := [name for name in channels if name not in CHANNELS]:
            raise ValueError(f"token_reward: unknown channel {unknown[0]!r}{_nearest(unknown[0], CHANNELS)}")
        if not channels or len(set(channels)) < len(channels):
            raise ValueError(f"token_reward: channels must be different ones, one at least, got {channels}")
        if self.weights is not None:
            self._check_weights(channels, list(self.weights))
        if self.mode not in ("normalised", "additive"):
            raise ValueError(f"token_reward: mode must be normalised or additive, got {self.mode!r}")
        given = dict(self.normalisation or {})
        if given and self.mode == "additive":
            raise ValueError("token_reward: the mode additive normalises nothing: leave normalisation out")
        for name, how in given.items():
            if name not in channels or name == "sparse" or how not in ("sum", "softmax", "abs"):
                raise ValueError(
                    f"token_reward: normalisation has {name}: {how}; it takes sum, softmax or abs for "
                    f"{', '.join(one for one in channels if one != 'sparse')}"
                )
        for name, least in (("samples", 2), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"token_reward: {name} must be a whole number from {least} on, got {value!r}")

    @staticmethod
    def _check_weights(channels: list[str], weights: list[float]) -> None:
        named = ", ".join(channels)
        if len(weights) != len(channels):
            raise ValueError(f"token_reward: {len(weights)} weights for {len(channels)} channels ({named})")
        numbers = [isinstance(w, int | float) and math.isfinite(w) and w >= 0 for w in weights]
        if not all(numbers) or abs(math.fsum(weights) - 1) > 1e-6:
            raise ValueError(
                f"token_reward: weights must be numbers >= 0 that add up to 1, for {named}; got {weights}"
            )

    @classmethod
    def read(cls, told: Any) -> TokenRewardOptions:
        """From the mapping of a recipe, or its JSON.

        Raises:
            ValueError: no mapping, an unknown key with the nearest one, no model, or a value that is refused.
        """
        if isinstance(told, str):
            try:
                told = json.loads(told)
            except ValueError as error:
                raise ValueError(f"token_reward is no JSON: {told!r} ({error})") from error
        if not isinstance(told, Mapping):
            raise ValueError(f"token_reward must be a mapping with model, channels and weights, got {told!r}")
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in told if name not in known]:
            raise ValueError(f"token_reward: unknown key {unknown[0]!r}{_nearest(unknown[0], known)}")
        if not isinstance(told.get("model"), str):
            raise ValueError(f"token_reward: model must name a reward model, got {told.get('model')!r}")
        return cls(**told)

    @property
    def path(self) -> str:
        """Folder or Hub id of the model."""
        return str(reward_model_path()) if self.model == EMBEDDED else self.model

    @cached_property
    def loaded(self) -> RewardModel:
        """The model.

        Raises:
            OSError: there is no such model, or it has no safetensors.
        """
        from huggingface_hub.errors import HFValidationError

        from .reward_model import RewardModel

        try:
            return RewardModel.load(self.path)
        except (OSError, HFValidationError) as error:
            raise OSError(
                f"token_reward.model {self.model!r} {unread(self.model, error)}: name a folder with a sequence "
                "classifier in safetensors, one on the Hub that this machine can reach, or an embedded one "
                f"({EMBEDDED})"
            ) from error


def unread(name: str, error: Exception) -> str:
    """Why a model cannot be read, in a few words: that the folder is not there, or what the Hub's client says."""
    path = Path(name).expanduser()
    if not path.exists() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
        return "is no folder"
    lines = str(error).partition("\n")[0]
    return f"cannot be read ({lines.strip().rstrip('.')})"


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
