"""Held-out episodes in an environment, played to their end and scored by their last reward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..samplers.transformers import less_work, only_what_is_asked
from ..tasks import Task
from ..tasks.environments import Environment
from ..tasks.environments.episodes import Episode, play_episodes, stop_ids
from ..tasks.environments.speech import Speech
from ..tasks.rewards import RewardFunction
from .measure import Answer, Decoding, draw_answers, generation_config, generators_kept, until_end


def answering(task: Task) -> Callable[..., list[Answer]]:
    """How answers to the problems of a task are drawn: in one turn, or by whole episodes."""
    return draw_answers if task.environment is None else partial(draw_episodes, task.environment.make)


def draw_episodes(
    make: Callable[[], Environment],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Dataset,
    reward_funcs: list[RewardFunction],
    decoding: Decoding,
    *,
    weights: list[float] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    draw: Any = None,
    advance: Callable[[int], object] = lambda n: None,
) -> list[Answer]:
    """As `draw_answers`, an episode for each answer: its text is all of it, its tokens are the model's own.

    The score is the reward of the last turn; `reward_funcs`, `weights` and `draw` are those of single answers, and
    not read. `decoding.max_new_tokens` is of one turn.
    """
    environments = [make() for _ in range(min(decoding.batch_size, len(problems) * decoding.samples))]
    config = generation_config(model, tokenizer, decoding)
    config.eos_token_id = [*config.eos_token_id, *stop_ids(environments[0], tokenizer)]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    speech = Speech(tokenizer, config.eos_token_id, chat_template_kwargs)
    asked = [(i, k) for i in range(len(problems)) for k in range(decoding.samples)]
    training, answers = model.training, []
    model.eval()
    try:
        with generators_kept(), torch.no_grad(), only_what_is_asked(model), less_work(model):
            torch.manual_seed(decoding.seed)
            for start in range(0, len(asked), len(environments)):
                part = asked[start : start + len(environments)]
                playing = environments[: len(part)]
                episodes = play_episodes(
                    playing,
                    [problems[i] for i, _ in part],
                    speech,
                    partial(_turn, model, tokenizer, config),
                    turn_tokens=decoding.max_new_tokens,
                    context=context,
                )
                for which, one, environment in zip(part, episodes, playing, strict=True):
                    answers.append(_answer(which, one, tokenizer, truncated=not environment.done))
                advance(len(part))
    finally:
        model.train(training)
    return answers


def _turn(
    model: Any, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, contexts: list[list[int]]
) -> tuple[list[list[int]], None]:
    width = max(map(len, contexts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(c)) + c for c in contexts], device=model.device)
    mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts], device=model.device)
    inputs = {"input_ids": ids, "attention_mask": mask}
    output = model.generate(**inputs, generation_config=config)[:, width:]
    return [until_end(row, config.eos_token_id) for row in output.tolist()], None


def _answer(
    which: tuple[int, int], episode: Episode, tokenizer: PreTrainedTokenizerBase, *, truncated: bool
) -> Answer:
    text = str(tokenizer.decode(episode.ids, skip_special_tokens=True))
    return Answer(*which, text, sum(episode.own), episode.reward, truncated=truncated)
