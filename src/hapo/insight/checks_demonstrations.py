"""What can be known to be wrong with learning from demonstrations before it starts.

Thresholds: docs/doctor_findings.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .checks_config import ROWS, judge_rate
from .finding import Finding, counted, percent

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase
    from trl import ModelConfig

    from ..engines.trl import SupervisedConfig
    from ..tasks.demonstration_sets import DemonstrationConfig, DemonstrationSet


@dataclass(frozen=True, kw_only=True)
class DemonstrationPlan:
    """A run of `hapo sft` before it starts."""

    config: DemonstrationConfig
    args: SupervisedConfig
    model_config: ModelConfig
    evaluate: bool
    """Whether held-out loss and accuracy are measured."""
    answer_limit: int
    """Tokens of a held-out answer, at most."""
    data: DemonstrationSet
    tokenizer: PreTrainedTokenizerBase
    architecture: PreTrainedConfig

    @cached_property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of at most `ROWS` demonstrations, evenly spaced, with their ends; and of what is no target."""
        rows = self.data.train.select(range(0, len(self.data.train), math.ceil(len(self.data.train) / ROWS)))
        return np.array([self._tokens(row) for row in rows]), np.array([self._asked(row) for row in rows])

    def _tokens(self, row: dict[str, Any]) -> int:
        if "messages" in row:
            return self._count(row["messages"])
        if "text" in row:
            return self._count(row["text"]) + 1
        if isinstance(row["completion"], str):
            return self._count(row["prompt"] + row["completion"]) + 1
        return self._count([*row["prompt"], *row["completion"]])

    def _asked(self, row: dict[str, Any]) -> int:
        return self._count(row["prompt"]) if "prompt" in row and self.args.completion_only_loss is not False else 0

    def _count(self, said: str | list[dict[str, Any]]) -> int:
        if isinstance(said, str):
            return len(self.tokenizer(said)["input_ids"])
        return len(self.tokenizer.apply_chat_template(said, tokenize=True, return_dict=True)["input_ids"])


def targets_cut(plan: DemonstrationPlan) -> Finding | None:
    """Demonstrations that max_length cuts."""
    limit = plan.args.max_length
    keeps_all = plan.args.packing and plan.args.packing_strategy != "bfd"  # the others go on in the next row
    if limit is None or keeps_all:
        return None
    lengths, asked = plan.lengths
    share, without = float((lengths > limit).mean()), float((asked >= limit).mean())
    if share == 0:
        return None
    lost = (
        f"; of {percent(without)} the prompt alone fills it, so that nothing is learnt from them"
        if without
        else ""
    )
    return Finding(
        "targets_cut",
        "error" if without > 0.5 else "warning",
        f"{percent(share)} of {len(lengths)} demonstrations are longer than max_length {limit}, the longest has "
        f"{lengths.max()} tokens{lost}",
        "what is beyond is cut off without a word, and with it the end of sequence: the model learns answers that "
        "do not stop",
        f"--max_length {2 ** math.ceil(math.log2(lengths.max()))}, or leave the long ones out of the data",
    )


def beyond_context(plan: DemonstrationPlan) -> Finding | None:
    """Demonstrations longer than what the model was trained on."""
    context = getattr(plan.architecture.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return None
    lengths = np.minimum(plan.lengths[0], plan.args.max_length or np.inf)
    share = float((lengths > context).mean())
    if share == 0:
        return None
    return Finding(
        "beyond_context",
        "warning",
        f"the model has {context} positions, and {percent(share)} of {len(lengths)} demonstrations are longer, "
        f"with max_length {plan.args.max_length}",
        "at positions that it was never trained on a model writes nonsense, without an error",
        f"--max_length {context}, or leave the long ones out of the data",
    )


def packed_across(plan: DemonstrationPlan) -> Finding | None:
    """Rows in which a demonstration sees those before it."""
    if not plan.args.packing or plan.args.packing_strategy != "wrapped":
        return None
    return Finding(
        "packed_across",
        "warning",
        "packing with packing_strategy wrapped: demonstrations are strung together and cut every "
        f"{plan.args.max_length} tokens",
        "a target is predicted with the demonstrations before it in view, and many begin in the middle, without "
        "their prompt; the attention does not keep them apart",
        "--packing_strategy bfd, which keeps each whole and apart from the others",
    )


def prompts_learnt(plan: DemonstrationPlan) -> Finding | None:
    """Conversations of which the user's words are targets."""
    if plan.args.assistant_only_loss or "messages" not in plan.data.train.column_names:
        return None
    return Finding(
        "prompts_learnt",
        "note",
        "the demonstrations are conversations, and assistant_only_loss is off",
        "what the user and the system say are targets too: the model learns to write questions",
        "--assistant_only_loss true, or columns with a prompt and a completion",
    )


def many_passes(plan: DemonstrationPlan) -> Finding | None:
    """Every demonstration seen again and again."""
    args, n = plan.args, len(plan.data.train)
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    passes = args.max_steps * step / n if args.max_steps > 0 else args.num_train_epochs
    if passes <= 10 or (args.packing and args.max_steps > 0):  # how many a packed row holds is not known here
        return None
    steps = max(1, math.floor(3 * n / step))
    return Finding(
        "many_passes",
        "warning",
        f"{counted(n, 'demonstration')}, each seen {passes:.3g} times",
        "after a few passes the demonstrations are learnt by heart, and held-out loss rises",
        f"--max_steps {steps}, for three passes; more demonstrations; or take the checkpoint with the lowest "
        "held-out loss",
    )


def not_measured(plan: DemonstrationPlan) -> Finding | None:
    """Nothing held out is measured, or little is."""
    n = len(plan.data.eval)
    if plan.evaluate and n >= 20:
        return None
    return Finding(
        "not_measured",
        "warning",
        f"{counted(n, 'demonstration')} held out" if plan.evaluate else "evaluate is off",
        "the loss on training data falls whatever is learnt: only held-out ones show when it is learnt by heart",
        "--eval_size 200, or data for evaluation (eval_file, eval_split)" if plan.evaluate else "--evaluate true",
    )


def no_accuracy(plan: DemonstrationPlan) -> Finding | None:
    """No gold answers, so that only the loss is measured."""
    if not plan.evaluate or plan.data.problems is not None:
        return None
    return Finding(
        "no_accuracy",
        "note",
        f"the held-out demonstrations of {plan.data.name} have no column {plan.config.answer_column!r}"
        if "text" not in plan.data.eval.column_names
        else "the demonstrations are texts without a question",
        "held-out loss alone is measured, which says how well the model copies, and not whether its answers are "
        "right",
        "--answer_column with the gold answers, if the data have some, beside a question",
    )


def answers_cut(plan: DemonstrationPlan) -> Finding | None:
    """Held-out answers are cut off before a demonstration's would end."""
    if not plan.evaluate or plan.data.problems is None or "completion" not in plan.data.train.column_names:
        return None
    lengths, asked = plan.lengths
    written = lengths - asked
    share = float((written > plan.answer_limit).mean())
    if plan.args.completion_only_loss is False or share <= 0.05:
        return None
    return Finding(
        "answers_cut",
        "warning",
        f"{percent(share)} of {len(lengths)} demonstrated answers are longer than max_completion_length "
        f"{plan.answer_limit}, the longest has {written.max()} tokens",
        "a model that learns to answer so is cut off when its held-out accuracy is measured, and counts as wrong",
        f"--max_completion_length {2 ** math.ceil(math.log2(written.max()))}",
    )


def supervised_rate(plan: DemonstrationPlan) -> Finding | None:
    """A learning rate a hundred times away from what is usual."""
    usual = {"full": 2e-5, "adapter": 2e-4, "gatera": 1e-3}
    found = judge_rate(plan.args.learning_rate, plan.model_config, plan.architecture, usual)
    if found is None:
        return None
    kind, rate, low = found
    return Finding(
        "supervised_rate",
        "warning",
        f"learning_rate {plan.args.learning_rate:g} with {kind}",
        "the model stays as it is"
        if low
        else "one optimiser step moves the model so far that it forgets what it could before",
        f"--learning_rate {rate:g}, and from there in steps of 3",
    )
