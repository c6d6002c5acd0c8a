"""Whole episodes, played side by side: for a trainer of group-relative methods, and for measuring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import Environment, tool_of
from .speech import Speech

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Draw = Callable[[list[list[int]]], tuple[list[list[int]], list[list[float]] | None]]
"""A turn after each context, end token included; the log-prob of each token, or None where they are not known."""


def stop_ids(environment: Environment, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a turn in this environment, beside the end of sequence: its `stop`, if it has any.

    Raises:
        ValueError: one of them is no single token.
    """
    found = []
    for text in getattr(environment, "stop", ()):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"the environment ends turns with {text!r}, which is no single token of this model")
        found += ids
    return found


@dataclass
class Episode:
    """One episode as token ids."""

    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    """What followed the prompt: turns of the model, and between them what the environment said."""
    own: list[bool] = field(default_factory=list)
    """Which of `ids` the model wrote."""
    logps: list[float] | None = field(default_factory=list)
    """Log-probs of what the model wrote, nats, 0 elsewhere; None where they are not known."""
    turns: list[tuple[int, float]] = field(default_factory=list)
    """Of each turn: the number of `ids` up to its end, and its reward."""

    @property
    def reward(self) -> float:
        """That of the last turn."""
        return self.turns[-1][1]


def play_episodes(
    environments: Sequence[Environment],
    rows: Sequence[dict[str, Any]],
    speech: Speech,
    draw: Draw,
    *,
    turn_tokens: int,
    context: int | None,
) -> list[Episode]:
    """An episode for each row, each in an environment of its own, all turns of the same number drawn at once.

    Args:
        environments: one for each row.
        rows: what `reset` is given; column `prompt` begins the context.
        speech: texts as token ids.
        draw: the policy.
        turn_tokens: most tokens of a turn.
        context: tokens that the model takes; None: any number. An episode is truncated where a whole turn more
            does not fit: the answer before it is left out.

    Raises:
        ValueError: not even a first turn fits, or an episode is over before it.
    """
    tools = [tool_of(environment) for environment in environments]
    episodes = []
    for environment, row in zip(environments, rows, strict=True):
        prompt = speech.prompt(row["prompt"], environment.reset(**row))
        if environment.done or (context is not None and len(prompt) + turn_tokens > context):
            raise ValueError(
                f"an episode of {type(environment).__name__} begins with {len(prompt)} tokens, and of {context} "
                f"are {turn_tokens} for a turn (or it is over before one): shorten the prompts, or a turn's tokens"
            )
        episodes.append(Episode(prompt))
    running = list(range(len(rows)))
    while running:
        drawn, logps = draw([episodes[i].prompt + episodes[i].ids for i in running])
        goes_on = []
        for n, i in enumerate(running):
            episode, environment = episodes[i], environments[i]
            _add(episode, drawn[n], None if logps is None else logps[n], own=True)
            said = tools[i](speech.said(drawn[n]))
            episode.turns.append((len(episode.ids), float(environment.reward)))
            if environment.done:
                continue
            answer = speech.answer(rows[i]["prompt"], drawn[n], said)
            length = len(episode.prompt) + len(episode.ids) + len(answer)
            if context is None or length + turn_tokens <= context:
                _add(episode, answer, [0.0] * len(answer), own=False)
                goes_on.append(i)
        running = goes_on
    return episodes


def _add(episode: Episode, ids: list[int], logps: list[float] | None, *, own: bool) -> None:
    episode.ids += ids
    episode.own += [own] * len(ids)
    if logps is None or episode.logps is None:
        episode.logps = None
    else:
        episode.logps += logps


def episode_reward(
    prompts: list[Any], completions: list[Any], episode_turns: list[list[tuple[int, float]]], **columns: Any
) -> list[float]:
    """Reward in TRL's signature: that of the last turn of each episode."""
    return [turns[-1][1] for turns in episode_turns]


def turn_reward(
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[list[int]],
    episode_turns: list[list[tuple[int, float]]],
    **columns: Any,
) -> list[list[float]]:
    """The same per token: the reward of each turn on its last token, 0 elsewhere."""
    rewards = []
    for ids, turns in zip(completion_ids, episode_turns, strict=True):
        per_token = [0.0] * len(ids)
        for end, reward in turns:
            per_token[end - 1] += reward
        rewards.append(per_token)
    return rewards
