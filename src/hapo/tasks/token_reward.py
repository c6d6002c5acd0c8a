"""Rewards per token from a reward model: its score of an answer, spread over the answer's tokens.

The shaped reward of arXiv 2504.16272: r'_t = r sum_k w_k E_kt, with r the score and the rows E of `attribution`.
`TokenReward` and `ModelReward` have TRL's signature of a reward function; the first returns a list of numbers for
each completion, the second a number.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from ..parts.credit import Normalisation, shaped_reward
from .attribution import Attributed, Attribution
from .reward_model import RewardModel
from .reward_options import NORMALISATIONS, TokenRewardOptions


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
