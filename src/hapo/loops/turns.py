"""Agents in their environments: contexts, sampled turns, and the segments of episodes that an update learns from.

The context of a turn is the text of the episode so far, token by token as it was taken, so that one forward pass
over the last context holds the states of all turns before it.

What an agent samples depends on the weights, its seed, its number and how many turns it has taken: on no generator
whose state a checkpoint would have to hold, and on no other agent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from ..tasks.environments import Environment, tool_of
from ..tasks.environments.speech import Speech
from .options import ETPOConfig


class Sampling(NamedTuple):
    """How turns are drawn."""

    max_new_tokens: int
    temperature: float
    """0 is greedy."""
    top_k: int
    """0 is all."""
    context: int
    """Tokens that an episode may have."""
    ends: tuple[int, ...]
    """Tokens that end a turn, and belong to it."""
    pad: int

    @classmethod
    def of(
        cls, model: Any, tokenizer: PreTrainedTokenizerBase, args: ETPOConfig, stop: Sequence[str] = ()
    ) -> Sampling:
        """As the options say, with the ends of the model, of its tokenizer, and of the environment.

        Raises:
            ValueError: no end token; or no context_length, and the model's config has no max_position_embeddings.
        """
        ends = model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends or [])} - {None}
        for text in stop:
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) != 1:
                raise ValueError(
                    f"the environment ends turns with {text!r}, which is no single token of this model"
                )
            ends.add(ids[0])
        if not ends:
            raise ValueError("the model and its tokenizer name no end-of-sequence token: a turn would have no end")
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        context = args.context_length or most
        if context is None or (most is not None and context > most):
            raise ValueError(
                f"context_length is {args.context_length}, and the model takes {most} tokens; set it lower"
            )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
        return cls(args.max_new_tokens, args.temperature, args.top_k, context, tuple(sorted(ends)), pad)


@dataclass(frozen=True)
class AgentTurn:
    """A turn that was taken."""

    start: int
    """Tokens of the context before it."""
    ids: list[int]
    text: str
    reward: float
    goes_on: bool
    """The episode did not end with it."""


@dataclass
class Segment:
    """A part of an episode that an update learns from."""

    agent: int
    number: int
    """Of the episode, among those of its agent."""
    prompt: str
    ids: list[int]
    """The context after the last turn, with what the environment said."""
    begun: int
    """Tokens of it that an earlier update has had."""
    turns: list[AgentTurn] = field(default_factory=list)


class Agent:
    """One environment and the episode in it.

    Args:
        number: of the agent.
        environment: its own instance.
        speech: texts as token ids.
        rows: row of the data set that its n-th episode begins with.
        context: tokens that an episode may have.
    """

    def __init__(
        self,
        number: int,
        environment: Environment,
        speech: Speech,
        rows: Callable[[int], dict[str, Any]],
        context: int,
    ) -> None:
        self.number, self.environment, self.speech, self.rows, self.limit = (
            number,
            environment,
            speech,
            rows,
            context,
        )
        self.tool = tool_of(environment)
        self.episodes, self.taken = -1, 0
        self.texts: list[list[int]] = []
        """Token ids of the turns of this episode."""
        self.begin()

    def begin(self) -> None:
        """Begin the next episode."""
        self.episodes += 1
        row = self.rows(self.episodes)
        self.row_prompt = row["prompt"]
        self.context = self.speech.prompt(self.row_prompt, self.environment.reset(**row))
        self.texts = []
        if self.environment.done or len(self.context) >= self.limit:
            raise ValueError(
                f"an episode of {type(self.environment).__name__} begins with {len(self.context)} tokens where "
                f"{self.limit} fit, or is over before its first turn: shorten the prompts or raise context_length"
            )

    def take(self, ids: list[int]) -> AgentTurn:
        """Take a turn: the environment answers, and its answer joins the context.

        An answer that does not fit is cut, and with it the episode is truncated: it goes on, but not here.
        """
        start, text = len(self.context), self.speech.said(ids)
        said = self.tool(text)
        self.texts.append(ids)
        self.taken += 1
        self.context = self.context + ids
        if not self.environment.done:
            self.context = (self.context + self.speech.answer(self.row_prompt, ids, said))[: self.limit]
        return AgentTurn(start, ids, text, float(self.environment.reward), not self.environment.done)

    @property
    def over(self) -> bool:
        """Whether no further turn fits into this episode: it ended, or was truncated."""
        return self.environment.done or len(self.context) >= self.limit

    def state(self) -> dict[str, Any]:
        """What `restore` takes: numbers and token ids."""
        return {"episodes": self.episodes, "taken": self.taken, "texts": self.texts, "context": self.context}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken: the turns of its episode are taken again.

        Raises:
            ValueError: the environment answers otherwise than it did.
        """
        self.episodes = state["episodes"] - 1
        self.begin()
        for ids in state["texts"]:
            self.take(ids)
        self.taken = state["taken"]
        if self.context != state["context"]:
            raise ValueError(
                f"agent {self.number}: the environment does not answer as it did before the checkpoint, so that "
                "the run cannot go on where it was; an environment must be a function of its row and turns"
            )


def collect(network: Any, agents: Sequence[Agent], turns: int, sampling: Sampling, seed: int) -> list[Segment]:
    """Let every agent take so many turns with this policy; a new episode begins where one is over."""
    found: list[Segment] = []
    now: dict[int, Segment] = {}
    for _ in range(turns):
        for agent in agents:
            begun = len(agent.context)
            if agent.over:
                begun = 0
                agent.begin()
            if agent.number not in now or agent.episodes != now[agent.number].number:
                prompt = str(agent.speech.tokenizer.decode(agent.context))
                segment = Segment(agent.number, agent.episodes, prompt, agent.context, begun * bool(agent.texts))
                now[agent.number] = segment
                found.append(segment)
        for agent, turn in zip(agents, _round(network, agents, sampling, seed), strict=True):
            now[agent.number].turns.append(turn)
            now[agent.number].ids = agent.context
    return found


def play(network: Any, agents: Sequence[Agent], sampling: Sampling, seed: int) -> None:
    """Let every agent come to the end of its episode."""
    while running := [agent for agent in agents if not agent.over]:
        _round(network, running, sampling, seed)


def _round(network: Any, agents: Sequence[Agent], sampling: Sampling, seed: int) -> list[AgentTurn]:
    """One turn of every agent."""
    noise = [_noise(seed, agent.number, agent.taken, sampling.max_new_tokens) for agent in agents]
    turns = sample(network, [agent.context for agent in agents], sampling, torch.stack(noise))
    return [agent.take(ids) for agent, ids in zip(agents, turns, strict=True)]


@torch.no_grad()
def sample(
    network: Any, contexts: Sequence[list[int]], sampling: Sampling, noise: Float[Tensor, "B T"]
) -> list[list[int]]:
    """A turn after each context: the token at which the cumulated probabilities pass the noise of its step.

    A turn ends with an end token, with `max_new_tokens`, or where the context is full.
    """
    device = network.device
    width = max(map(len, contexts))
    ids = torch.tensor([[sampling.pad] * (width - len(c)) + c for c in contexts], device=device)
    attention = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts], device=device)
    position = (attention.cumsum(1) - 1).clamp(min=0)
    room = torch.tensor([min(sampling.max_new_tokens, sampling.context - len(c)) for c in contexts], device=device)
    ends = torch.tensor(sampling.ends, device=device)
    # past_key_values is cache since transformers 5.24.
    kept = "cache" if "cache" in inspect.signature(type(network).forward).parameters else "past_key_values"
    cache, taken, running = DynamicCache(config=network.config), [], room > 0
    for t in range(int(room.max())):
        out = network(
            input_ids=ids,
            attention_mask=attention,
            position_ids=position,
            use_cache=True,
            **{kept: cache},
            logits_to_keep=1,
        )
        token = _pick(out.logits[:, -1].float(), sampling, noise[:, t].to(device))
        taken.append(torch.where(running, token, -1))
        running = running & ~torch.isin(token, ends) & (t + 1 < room)
        if not running.any():
            break
        ids, position = token[:, None], position[:, -1:] + 1
        attention = torch.cat([attention, attention.new_ones(len(contexts), 1)], 1)
    rows = torch.stack(taken, 1).tolist()
    return [[token for token in row if token >= 0] for row in rows]


def _pick(logits: Float[Tensor, "B V"], sampling: Sampling, noise: Float[Tensor, " B"]) -> Tensor:
    if sampling.temperature == 0:
        return logits.argmax(-1)
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    reach = (logits.double() / sampling.temperature).softmax(-1).cumsum(-1)
    # Below their sum, which rounding may leave below 1; to the right, past tokens of probability 0.
    return torch.searchsorted(reach, (noise[:, None] * reach[:, -1:]).contiguous(), right=True).squeeze(1)


def _noise(seed: int, agent: int, turn: int, tokens: int) -> Float[Tensor, " T"]:
    """Uniform numbers below 1 for the turn of an agent."""
    return torch.from_numpy(np.random.default_rng([seed, agent, turn]).random(tokens))
