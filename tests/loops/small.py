"""Small agents for the tests: an environment of a few tokens, a random Llama, and a model that is a table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn

from hapo.loops.etpo import ETPO
from hapo.loops.options import ETPOConfig
from hapo.tasks.environments import EnvironmentTask
from tests.engines import tiny

OPTIONS: dict[str, Any] = {
    "environments": 3,
    "turns_per_update": 2,
    "max_steps": 3,
    "max_new_tokens": 3,
    "temperature": 1.0,
    "top_k": 0,
    "learning_rate": 1e-3,
    "beta": 0.1,
    "use_cpu": True,
}


class Echo:
    """Says the length of a turn; an even one is rewarded, and a third turn or a turn of `enough` is the last one."""

    def __init__(self, max_turns: int = 3, enough: int = 3) -> None:
        self.max_turns, self.enough, self.reward, self.done, self._turns = max_turns, enough, 0.0, True, 0

    def reset(self, **row: Any) -> str | None:
        """Begin; every other row says something more."""
        self.reward, self.done, self._turns = 0.0, False, 0
        return "a" if row["i"] % 2 else None

    def say(self, text: str) -> str:
        """Say something.

        Args:
            text: Whatever it is.
        """
        self._turns += 1
        self.reward = float(len(text) % 2 == 0)
        self.done = self._turns >= self.max_turns or len(text) == self.enough
        return f"{len(text)}="

    def get_reward(self) -> float:
        """The last one."""
        return self.reward


def load(seed: int, train_size: int, eval_size: int) -> tuple[type[Echo], Dataset, Dataset]:
    """The environment as `load_environment` takes it."""
    return Echo, tiny.data(train_size), tiny.data(eval_size)


def chats(seed: int, train_size: int, eval_size: int) -> tuple[type[Echo], Dataset, Dataset]:
    """The same with messages for prompts."""
    rows = [{"prompt": [{"role": "user", "content": "Solve problem"}], "i": 2 * i} for i in range(train_size)]
    return Echo, Dataset.from_list(rows), Dataset.from_list(rows[:eval_size])


def task(environment: Any = Echo, **options: Any) -> EnvironmentTask:
    return EnvironmentTask("echo", environment, tiny.data(12), tiny.data(5), options)


def run(peft_config: Any = None, where: EnvironmentTask | None = None, seed: int = 0, **options: Any) -> ETPO:
    args = ETPOConfig(**{**OPTIONS, **options})
    return ETPO(
        tiny.model(seed),
        tiny.tokenizer(),
        task() if where is None else where,
        args,
        peft_config,
        Accelerator(cpu=True),
    )


TABLE = torch.tensor([[1.0, 0.0], [0.5, -0.5]])
"""Rewards of answers of two tokens, as in the spec."""


class Table(nn.Module):
    """A causal language model whose logits are a table: a row for each pair of the last token and its place.

    Tokens beside the digits 0 and 1 have logits of -inf, and no gradient.
    """

    def __init__(self, allowed: tuple[int, ...], vocabulary: int) -> None:
        super().__init__()
        text = SimpleNamespace(vocab_size=vocabulary, max_position_embeddings=16, model_type="table")
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self.vocabulary, self.allowed = vocabulary, allowed
        self.head = nn.Linear(vocabulary * 16, len(allowed), bias=False, dtype=torch.float64)
        nn.init.zeros_(self.head.weight)
        self.base_model = self._states

    @property
    def device(self) -> torch.device:
        """Of the table."""
        return self.head.weight.device

    def get_output_embeddings(self) -> Any:
        """Hidden states to logits over the whole vocabulary."""

        def logits(hidden: Tensor) -> Tensor:
            whole = hidden.new_full((*hidden.shape[:-1], self.vocabulary), -torch.inf)
            index = torch.tensor(self.allowed).expand(*hidden.shape[:-1], -1)
            return whole.scatter(-1, index, self.head(hidden))

        return logits

    def _states(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> SimpleNamespace:
        place = attention_mask.cumsum(1) - 1
        hidden = nn.functional.one_hot(place.clamp(min=0) * self.vocabulary + input_ids, self.vocabulary * 16)
        return SimpleNamespace(last_hidden_state=hidden.double())


def first_update() -> dict[str, Tensor]:
    """The gradients of policy and critic in the first update: what plain gradient descent of rate 1 takes off."""
    loop = run(environments=3, max_steps=1, max_grad_norm=1e9)
    before = weights(loop)
    for name in ("policy", "critic"):
        loop.optimisers[name] = torch.optim.SGD(loop.networks.parameters(name).values(), lr=1.0)
    metrics = next(loop.steps())
    after = weights(loop)
    numbers = {name: torch.tensor(float(x)) for name, x in metrics.items()}
    return {name: before[name] - x for name, x in after.items()} | numbers


def weights(loop: ETPO) -> dict[str, Tensor]:
    """Of policy, critic and target."""
    return {
        f"{name}.{key}": x.detach().clone()
        for name in ("policy", "critic", "target")
        for key, x in loop.networks.parameters(name).items()
    }
