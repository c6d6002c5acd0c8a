"""Episodes of several turns as TRL's `rollout_func`: plain text, without tool calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ...tasks.environments import Environment
from ...tasks.environments.episodes import play_episodes, stop_ids
from ...tasks.environments.speech import Speech

EPISODE_TURNS = "episode_turns"
"""What a reward function gets under this name: for each turn the number of ids up to its end, and its reward."""


class EnvironmentRollout:
    """Plays an environment with the policy of a `HAPOTrainer`: every turn of the model is one call of it.

    ```python
    play = EnvironmentRollout(AdditionEnvironment)
    HAPOTrainer(model, episode_reward, args=args, train_dataset=rows, rollout_func=play)
    ```

    The other way is TRL's `environment_factory`, for models whose chat template knows tool calls. Here a model
    needs none. The trainer draws each turn, with the method's temperature rule and with the log-probs that correct
    for it; what the environment says is in the context, and masked. `max_completion_length` is of one turn. An
    episode whose next turn may not fit into the context is truncated.

    Beside the tokens a reward function gets `episode_turns`: for each turn the number of ids up to its end, and
    its reward (`hapo.tasks.environments.episodes.episode_reward` and `turn_reward` read it).

    Args:
        make: an environment; called as often as there are responses in a rollout batch, the instances are used
            again.
        context_length: tokens that an episode may have; default: what the model takes.

    Raises:
        ValueError: of a call, a prompt leaves no room for a turn, context_length is beyond what the model takes,
            or the environment ends turns with tokens of its own and vLLM draws them.
    """

    draws_with_trainer = True
    """A temperature rule acts in it, unlike in a rollout function that samples by itself."""

    def __init__(self, make: Callable[[], Environment], context_length: int | None = None) -> None:
        self.make, self.context_length = make, context_length
        self._environments: list[Environment] = []

    def _tell_ends(self, trainer: Any) -> None:
        """Let turns end as the environment says; one that ends so is not cut off."""
        ends = [*trainer.eos_token_ids]
        ends += [token for token in stop_ids(self._environments[0], trainer._tokenizer) if token not in ends]
        if ends == trainer.eos_token_ids:
            return
        if trainer.use_vllm:
            raise ValueError(
                f"{type(self._environments[0]).__name__} ends turns with tokens of its own, and vLLM is not told "
                "of them: set use_vllm=False"
            )
        trainer.eos_token_ids = trainer.generation_config.eos_token_id = ends
        trainer.generation_kwargs["eos_token_id"] = ends

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Tokens of the episodes that begin with the rows that `trainer` is asked for."""
        rows = trainer.rollout_rows
        while len(self._environments) < len(rows):
            self._environments.append(self.make())
        self._tell_ends(trainer)
        most = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
        if self.context_length is not None and most is not None and self.context_length > most:
            raise ValueError(f"context_length={self.context_length}, and the model takes {most} tokens; lower it")
        episodes = play_episodes(
            self._environments[: len(rows)],
            rows,
            Speech(trainer._tokenizer, trainer.eos_token_ids, trainer.chat_template_kwargs),
            partial(trainer._generate_single_turn, images=None, multimodal_fields={}, num_generations=1),
            turn_tokens=trainer.max_completion_length,
            context=self.context_length or most,
        )
        logps = [episode.logps for episode in episodes]
        return {
            "prompt_ids": [episode.prompt for episode in episodes],
            "completion_ids": [episode.ids for episode in episodes],
            "logprobs": None if None in logps else logps,
            "env_mask": [[int(own) for own in episode.own] for episode in episodes],
            EPISODE_TURNS: [episode.turns for episode in episodes],
        }


def turn_numbers(turns: Sequence[Sequence[tuple[int, float]]], mask: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Number of the turn of each token, from 0; what the environment says is of the turn after it."""
    numbers = torch.zeros_like(mask, dtype=torch.long)
    for row, of_row in enumerate(turns):
        for end, _ in of_row[:-1]:
            numbers[row, end:] += 1
    return numbers
