"""What stands beside the methods in the list of `hapo methods`: an adapter, two optimisers and an agent, in words.

It imports nothing, so that a list of names takes no second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Companion:
    """An adapter or an optimiser that any method trains with, or an agent with a loop of its own."""

    name: str
    kind: Literal["adapter", "optimiser", "agent"]
    summary: str
    title: str
    """Of its paper."""
    year: int
    arxiv: str
    home: str
    """Module and class."""
    use: str
    """How to name it."""
    options: dict[str, list[str]]
    """Option -> its default and its meaning."""


GATERA = Companion(
    name="gatera",
    kind="adapter",
    summary="a sigmoid gate per adapted layer and token scales the adapter's branch",
    title="GateRA: Token-Aware Modulation for Parameter-Efficient Fine-Tuning",
    year=2025,
    arxiv="2511.17582",
    home="hapo.adapters.GateRAConfig",
    use="peft_config=GateRAConfig(r=32, task_type='CAUSAL_LM'); gatera: {r: 32} in a recipe",
    options={
        "r": ["32", "rank (paper)"],
        "branch": ["'hira'", "what is gated: hira (paper), lora or dora"],
        "entropy_weight": ["0.01", "weight of the gates' binary entropy (ours)"],
        "gate_std": ["0.02", "deviation of the gates' weights at the start (ours)"],
        "dropout": ["0.0", "of the branch's input"],
    },
)

_OPTIMISTIC = (
    "Towards Better Understanding of Adaptive Gradient Algorithms in Generative Adversarial Nets",
    2020,
    "1912.11940",
)
_LR = ["0.001", "eta; TRL's learning_rate"]
_DECAY = ["0.0", "adds weight_decay z to the gradient"]

OADAGRAD = Companion(
    "oadagrad",
    "optimiser",
    "Adagrad that looks ahead with its last gradient, for games: one gradient per step",
    *_OPTIMISTIC,
    home="hapo.optim.OptimisticAdagrad",
    use="optim='oadagrad', optim_args='delta=0.5,lag=0' in HAPOConfig or SupervisedConfig",
    options={
        "lr": _LR,
        "delta": ["1.0", "added to the root of the sum of squares; about the largest gradient (theory)"],
        "lag": ["0", "1: the metric has no gradient newer than the last but one"],
        "include_g0": ["True", "whether the first gradient is in the sum"],
        "weight_decay": _DECAY,
    },
)

OSG = Companion(
    "osg",
    "optimiser",
    "gradient descent that looks ahead with its last gradient, for games: one gradient per step",
    *_OPTIMISTIC,
    home="hapo.optim.OptimisticSGD",
    use="optim='osg' in HAPOConfig or SupervisedConfig",
    options={
        "lr": _LR,
        "weight_decay": _DECAY,
        "projection": ["None", "onto a convex set, of each parameter; in Python alone"],
    },
)

ETPO = Companion(
    name="etpo",
    kind="agent",
    summary="a critic with a Q value for every token, by soft Bellman backups token by token, for several turns",
    title="Entropy-Regularized Token-Level Policy Optimization for Language Agent Reinforcement",
    year=2024,
    arxiv="2402.06700",
    home="hapo.loops.etpo.ETPO",
    use="hapo train --method etpo",
    options={
        "beta": ["0.01", "weight of KL(policy || initial model), reward per nat (authors' code)"],
        "gamma": ["0.99", "discount between turns; inside a turn there is none (authors' code)"],
        "polyak": ["0.995", "share of itself that the target critic keeps an update (authors' code)"],
        "huber_delta": ["10.0", "where the critic's loss becomes linear (authors' code)"],
        "target": ["'kl_ref'", "kl_ref (derived), entropy, or released, which learns nothing from the critic"],
        "lam": ["0.0", "share of the trajectory in the targets, soft TD(lambda) (ours)"],
        "critic": ["'logits'", "what Q is: logits, or residual, minus those of the initial model (ours)"],
    },
)

COMPANIONS = {one.name: one for one in (GATERA, OADAGRAD, OSG, ETPO)}
"""By name."""
