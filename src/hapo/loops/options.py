"""The options of ETPO's loop, their defaults and where these come from."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..parts.soft_q import PolicyTarget

Critic = Literal["logits", "residual"]


@dataclass(kw_only=True)
class ETPOConfig:
    """What `hapo.loops.etpo` is told. Defaults are those of the authors' code, unless a line says otherwise.

    Raises:
        ValueError: a value out of range, named with what is allowed.
    """

    method: Literal["etpo"] = field(default="etpo", metadata={"help": "this loop's"})
    output_dir: str = field(default="runs/etpo", metadata={"help": "the run folder"})

    environment: str = field(
        default="addition",
        metadata={
            "help": "what the agents act in: addition, code, or MODULE:FUNCTION, which is called with seed, "
            "train_size and eval_size and returns the environment's class and two data sets"
        },
    )
    environment_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'of the environment\'s class, as {"max_turns": 2}'}
    )
    train_size: int = field(default=4096, metadata={"help": "rows that episodes begin with"})
    eval_size: int = field(default=200, metadata={"help": "held-out rows"})

    beta: float = field(default=0.01, metadata={"help": "weight of KL(policy || initial model), reward per nat"})
    gamma: float = field(default=0.99, metadata={"help": "discount between turns; inside a turn there is none"})
    polyak: float = field(
        default=0.995, metadata={"help": "share of itself that the target critic keeps an update"}
    )
    huber_delta: float = field(default=10.0, metadata={"help": "where the critic's loss becomes linear"})
    target: PolicyTarget = field(
        default="kl_ref",
        metadata={
            "help": "what the policy is moved towards: kl_ref, its optimum under the KL to the initial model; "
            "entropy, that under an entropy bonus; released, the authors' expression, which learns nothing"
        },
    )
    lam: float = field(
        default=0.0,
        metadata={
            "help": "share of the trajectory in the targets, soft TD(lambda); 0 is the paper's backup (ours)"
        },
    )
    critic: Critic = field(
        default="logits",
        metadata={
            "help": "Q values: logits, as they are, which begin far from any reward; residual, minus those of the "
            "initial model, which begin at 0 (ours)"
        },
    )

    environments: int = field(default=8, metadata={"help": "agents that act side by side, over all processes"})
    turns_per_update: int = field(default=2, metadata={"help": "turns that each agent takes before an update"})
    max_steps: int = field(default=250, metadata={"help": "updates; with two turns each, 500 turns an agent"})
    per_device_train_batch_size: int = field(
        default=8,
        metadata={"help": "episodes in one forward and backward pass; results do not depend on it (ours)"},
    )
    learning_rate: float = field(default=1e-6, metadata={"help": "of the policy, AdamW (the authors take Lion)"})
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "of the critic; that of the policy"}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "of both (ours)"})
    max_grad_norm: float = field(default=10.0, metadata={"help": "at which the gradient of either is clipped"})

    max_new_tokens: int = field(default=256, metadata={"help": "of a turn"})
    temperature: float = field(default=0.5, metadata={"help": "at which turns are drawn; 0 is greedy"})
    top_k: int = field(default=50, metadata={"help": "likeliest tokens that turns are drawn from; 0 is all"})
    context_length: int | None = field(
        default=None, metadata={"help": "tokens that an episode may have; what the model takes (ours)"}
    )

    seed: int = field(default=0, metadata={"help": "of rows, turns and adapters"})
    use_cpu: bool = field(default=False, metadata={"help": "even where there is a GPU"})
    logging_steps: int = field(default=1, metadata={"help": "updates between lines of metrics.jsonl"})
    save_steps: int = field(
        default=50, metadata={"help": "updates between checkpoints; one is written at the end too"}
    )
    save_total_limit: int = field(default=2, metadata={"help": "checkpoints that are kept"})
    record_tokens_every: int = field(
        default=10, metadata={"help": "updates between token records, besides the first; 0 writes none"}
    )
    record_tokens_rows: int = field(default=64, metadata={"help": "turns of a token record, at most"})

    def __post_init__(self) -> None:
        """Check the ranges."""
        ranges = {
            "beta": self.beta >= 0,
            "gamma": 0 <= self.gamma <= 1,
            "polyak": 0 <= self.polyak < 1,
            "lam": 0 <= self.lam <= 1,
            "huber_delta": self.huber_delta > 0,
            "learning_rate": self.learning_rate > 0,
            "critic_learning_rate": self.critic_learning_rate is None or self.critic_learning_rate > 0,
            "weight_decay": self.weight_decay >= 0,
            "max_grad_norm": self.max_grad_norm > 0,
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "seed": self.seed >= 0,
            "record_tokens_every": self.record_tokens_every >= 0,
        }
        at_least_one = (
            *("train_size", "eval_size", "environments", "turns_per_update", "max_steps", "max_new_tokens"),
            *(
                "per_device_train_batch_size",
                "logging_steps",
                "save_steps",
                "save_total_limit",
                "record_tokens_rows",
            ),
        )
        ranges |= {name: getattr(self, name) >= 1 for name in at_least_one}
        ranges["context_length"] = self.context_length is None or self.context_length >= 2
        wrong = [name for name, right in ranges.items() if not right]
        if wrong:
            allowed = {"gamma": "in [0, 1]", "lam": "in [0, 1]", "polyak": "in [0, 1)"}
            allowed |= dict.fromkeys(
                ("beta", "weight_decay", "temperature", "top_k", "seed", "record_tokens_every"), ">= 0"
            )
            allowed |= dict.fromkeys(
                ("huber_delta", "learning_rate", "critic_learning_rate", "max_grad_norm"), "> 0"
            )
            allowed |= {"context_length": ">= 2"}
            raise ValueError(f"{wrong[0]} must be {allowed.get(wrong[0], '>= 1')}, got {getattr(self, wrong[0])}")
        for name, kinds in (("target", get_args(PolicyTarget)), ("critic", get_args(Critic))):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} must be one of {', '.join(kinds)}, got {getattr(self, name)!r}")
        if isinstance(self.environment_options, str):
            with suppress(json.JSONDecodeError):
                self.environment_options = json.loads(self.environment_options)
        if self.environment_options is not None and not isinstance(self.environment_options, dict):
            raise ValueError(f"environment_options must be a mapping, got {self.environment_options!r}")
        if self.lam and (self.temperature != 1 or self.top_k):
            raise ValueError(
                f"lam={self.lam} takes turns for draws of the policy: set temperature to 1 and top_k to 0, got "
                f"{self.temperature} and {self.top_k}"
            )
