"""Rewards per token from a reward model: its score of an answer, spread over the answer's tokens.

The shaped reward of arXiv 2504.16272: r'_t = r sum_k w_k E_kt, with r the score and the rows E of `attribution`.
`TokenReward` and `ModelReward` have TRL's signature of a reward function; the first returns a list of numbers for
each completion, the second a number.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch

from ..assets import reward_model_path
from ..parts.credit import Normalisation, shaped_reward
from .attribution import CHANNELS, Attributed, Attribution
from .reward_model import RewardModel

EMBEDDED = "reward_tiny"
"""The name of the bundled reward model in a recipe."""

NORMALISATIONS: dict[str, Normalisation] = {"shap": "sum", "lime": "softmax", "attention": "sum"}
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
        for name, least in (("samples", 2), ("batch_size", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
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
        """The model; raises as `RewardModel.load`."""
        return RewardModel.load(self.path)


class ModelReward:
    """The score of whole answers, as `reward_model` in the option `rewards`."""

    __name__ = "reward_model"

    def __init__(self, options: TokenRewardOptions) -> None:
        self._options = options

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        """A number for each answer; None for a score that is not finite."""
        model, size = self._options.loaded, self._options.batch_size
        rows = [p + list(c) for p, c in zip(prompt_ids(model, prompts), completion_ids, strict=True)]
        scores = [score for start in range(0, len(rows), size) for score in model(rows[start : start + size])]
        return [score if math.isfinite(score) else None for score in scores]


class TokenReward:
    """The score of answers, spread over their tokens by the weights of the channels.

    Channels of weight 0 are not computed. The model is loaded by `prepare`, or at the first call.
    """

    __name__ = "token_reward"

    def __init__(self, options: TokenRewardOptions) -> None:
        self.options = options
        weights = dict(zip(options.channels, options.weights or [], strict=options.weights is not None))
        self._channels = [name for name, weight in weights.items() if name != "sparse" and weight > 0]
        self._weights = [*(weights[name] for name in self._channels), weights.get("sparse", 0.0)]

    def prepare(self, tokenizer: Any, device: torch.device | str) -> None:
        """Load the model onto a device, for a policy with this tokenizer.

        Raises:
            ValueError: the policy's token ids mean something else to the model.
        """
        self.options.loaded.check_tokens(tokenizer)
        self.options.loaded.model.to(device)

    @cached_property
    def _attribution(self) -> Attribution:
        options = self.options
        return Attribution(
            options.loaded,
            channels=self._channels or ["sparse"],
            samples=options.samples,
            seed=options.seed,
            cache=None if options.cache is None else Path(options.cache),
            batch_size=options.batch_size,
        )

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any
    ) -> list[list[float] | None]:
        """A number for each token of each answer; None where the score of the answer is not finite."""
        found = self._attribution(prompt_ids(self.options.loaded, prompts), completion_ids)
        shaped = self._shaped(found, [len(ids) for ids in completion_ids])
        return [
            row[: len(ids)] if math.isfinite(one.score) else None
            for row, ids, one in zip(shaped, completion_ids, found, strict=True)
        ]

    def _shaped(self, found: list[Attributed], lengths: list[int]) -> list[list[float]]:
        width = max(lengths, default=0)
        rows = torch.zeros(len(found), len(self._channels), width, dtype=torch.float64)
        for i, (one, length) in enumerate(zip(found, lengths, strict=True)):
            for k, name in enumerate(self._channels):
                rows[i, k, :length] = torch.tensor(one.channels[name], dtype=torch.float64)
        normalisation = None
        if self.options.mode == "normalised":
            how = {**NORMALISATIONS, **(self.options.normalisation or {})}
            normalisation = [cast(Normalisation, how[name]) for name in self._channels]
        return shaped_reward(
            torch.tensor([one.score for one in found], dtype=torch.float64),
            rows,
            self._weights,
            torch.arange(width) < torch.tensor(lengths, dtype=torch.long)[:, None],
            normalisation=normalisation,
            mode=self.options.mode,
        ).tolist()


def prompt_ids(model: RewardModel, prompts: list[Any]) -> list[list[int]]:
    """Token ids of prompts as the reward model's tokenizer has them; messages go through its chat template.

    Raises:
        ValueError: messages, and the tokenizer has no chat template.
    """
    tokenizer = model.tokenizer
    if all(isinstance(prompt, str) for prompt in prompts):
        return [list(ids) for ids in tokenizer(text=prompts).input_ids] if prompts else []
    if tokenizer.chat_template is None:
        raise ValueError(
            "the prompts are messages, and the reward model's tokenizer has no chat template: set chat to false, "
            "or take a reward model that has one"
        )
    return tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True).input_ids


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
