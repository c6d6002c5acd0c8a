"""What the doctor reports."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

IN_VERL = {
    "max_completion_length": "data.max_response_length",
    "num_generations": "actor_rollout_ref.rollout.n",
    "top_p": "actor_rollout_ref.rollout.top_p",
    "top_k": "actor_rollout_ref.rollout.top_k",
    "learning_rate": "actor_rollout_ref.actor.optim.lr",
    "max_grad_norm": "actor_rollout_ref.actor.optim.clip_grad",
    "steps_per_generation": "data.train_batch_size / actor_rollout_ref.actor.ppo_mini_batch_size",
    "max_num_gen_batches": "algorithm.filter_groups.enable=True, data.gen_batch_size",
    "overlong_buffer": "+reward.reward_kwargs.overlong_buffer_cfg",
    "max_steps": "trainer.total_training_steps",
    "evaluate_samples": "actor_rollout_ref.rollout.val_kwargs.n",
    "method_options": "+hapo.options",
    "bf16": "actor_rollout_ref.actor.fsdp_config.model_dtype",
    "dtype": "actor_rollout_ref.rollout.dtype",
}
"""Option of `hapo train` -> what it is called in verl."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a training run, or worth knowing about it."""

    name: str
    severity: Literal["error", "warning", "note"]
    """error: training cannot work, or did not; warning: it works otherwise than meant; note: worth knowing."""
    saw: str
    """What was seen, with its numbers."""
    why: str
    """Why it matters."""
    change: str
    """What to do: the option and a value."""


def percent(share: float) -> str:
    """A share as text: `37 %`; with a decimal below 10 %."""
    return f"{100 * share:.{0 if share == 0 or share >= 0.0995 else 1}f} %"


def counted(n: int, noun: str) -> str:
    """A number with its noun: `1 pair`, `2 pairs`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def in_verl(finding: Finding) -> Finding:
    """The finding for a run of verl: the same remedy under the names that verl has for its options."""
    change = re.sub(r"--(\w+)", lambda found: IN_VERL.get(found[1], found[0]), finding.change)
    change = re.sub(r"hapo train --resume \S+", "run the same command again: trainer.resume_mode=auto", change)
    return replace(finding, change=change)
