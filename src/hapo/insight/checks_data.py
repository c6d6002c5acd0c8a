"""What can be known to be wrong with the data of a run before it starts. Thresholds: docs/doctor_findings.md."""

from __future__ import annotations

import functools
import math
from collections import Counter
from pathlib import Path

import numpy as np

from ..tasks import extract_answer, math_verify_reward
from ..tasks.addition import solution
from ..tasks.answers import normalise
from ..tasks.columns import answer_column, value_of
from ..tasks.config import REASONING_GYM
from ..tasks.data import sources
from ..tasks.reading import gold_text
from .checks_config import Plan
from .finding import Finding, percent


def few_problems(plan: Plan) -> Finding | None:
    """Less training data than one rollout batch takes."""
    args = plan.args
    needed = args.generation_batch_size // args.num_generations
    if plan.task is None or len(plan.task.train) >= needed:
        return None
    micro = args.per_device_train_batch_size * args.world_size
    return Finding(
        "few_problems",
        "error",
        f"{len(plan.task.train)} training problems; a rollout batch takes {needed} "
        f"({args.generation_batch_size} answers, {args.num_generations} a problem)",
        "training refuses to start: a rollout batch holds no problem twice",
        f"more problems (train_size), or a rollout batch of at most {len(plan.task.train) * args.num_generations} "
        f"answers: per_device_train_batch_size x processes ({micro} now) x steps_per_generation "
        f"({args.steps_per_generation} now)",
    )


def unusable_golds(plan: Plan) -> Finding | None:
    """Gold answers that no reward can compare with."""
    config = plan.task_config
    if plan.task is None or config.dataset == "addition" or config.dataset.startswith(REASONING_GYM):
        return None
    verified = {"auto", "math_verify"} & set(config.rewards)
    compared = verified or "exact" in config.rewards
    fault_of = math_verify_reward(config.reward_timeout).fault if verified else lambda gold: None
    fault_of = functools.cache(fault_of)
    bad, total = [], 0
    given = sources(config)
    for source, rows in {**given.training, **(given.evaluation or {})}.items():
        total += len(rows)
        column, place = answer_column(rows, config), Path(source).name if Path(source).exists() else source
        for number, row in enumerate(rows, 1):
            gold = value_of(row, column)
            if isinstance(gold, list | dict) and gold and not compared:
                continue
            try:
                text = gold_text(gold)
                fault = fault_of(text) if text.strip() else "empty"
            except ValueError:
                fault = "no text and no number"
            if fault is not None:
                bad.append(f"{place}, row {number}: {gold!r:.60} ({fault})")
    if not bad:
        return None
    dropped = config.on_bad_gold == "drop"
    return Finding(
        "unusable_golds",
        "error" if not dropped else "warning" if len(bad) > 0.1 * total else "note",
        f"{len(bad)} of {total} gold answers ({percent(len(bad) / total)}) cannot be used: "
        + "; ".join(bad[:5])
        + (f"; and {len(bad) - 5} more" if len(bad) > 5 else ""),
        "training leaves these rows out" if dropped else "training refuses to start: no answer could score here",
        "repair them" if dropped else "repair them, or --on_bad_gold drop",
    )


def majority_answer(plan: Plan) -> Finding | None:
    """One constant answer that earns much reward."""
    if plan.task is None or not {"auto", "exact", "math_verify"} & set(plan.task_config.rewards):
        return None
    golds = Counter(normalise(extract_answer(gold)) for gold in plan.task.train["answer"] if gold)
    answer, count = max(golds.items(), key=lambda item: item[1], default=("", 0))
    share = count / len(plan.task.train)
    if share <= 0.3:
        return None
    return Finding(
        "majority_answer",
        "warning",
        f"the gold answer {answer!r:.60} is that of {percent(share)} of {len(plan.task.train)} training problems",
        f"a model that always says so scores {share:.2f}, which is easier to learn than the task: reward rises, "
        "entropy falls, and nothing else is learned",
        "balance the answers in the data, or take problems whose answers differ; judge runs by what they gain "
        f"over {share:.2f}",
    )


def short_completions(plan: Plan) -> Finding | None:
    """Worked answers of the data that do not fit into a completion."""
    if plan.task is None or plan.tokenizer is None:
        return None
    limit, texts = plan.args.max_completion_length, _worked_answers(plan)
    lengths = np.array([len(ids) + 1 for ids in plan.tokenizer(texts, add_special_tokens=False)["input_ids"]])
    share = float((lengths > limit).mean())
    if share <= 0.05:
        return None
    return Finding(
        "short_completions",
        "error" if share > 0.5 else "warning",
        f"{percent(share)} of {len(texts)} worked answers in the data are longer than max_completion_length "
        f"{limit}; the longest has {lengths.max()} tokens, its end included",
        "an answer that is cut off before its result scores 0 however right it is, and training shortens the "
        "others in place of improving them",
        f"--max_completion_length {2 ** math.ceil(math.log2(lengths.max()))}",
    )


def _worked_answers(plan: Plan) -> list[str]:
    """The worked solutions where the data have them, otherwise the gold answers.

    Those of addition are what the autoregressive model in the package writes; the masked-diffusion one does not.
    """
    task = plan.task_config
    if task.dataset == "addition" and task.environment is None and not plan.args.trains_diffusion:
        pairs = [question.split("+") for question in plan.problems["question"]]
        return [solution(int(a), int(b)) for a, b in pairs]
    return [str(text) for text in plan.problems.get("solution", plan.problems["answer"])]


def context_exceeded(plan: Plan) -> Finding | None:
    """Prompts that leave too little of the model's context."""
    context = plan.architecture and getattr(plan.architecture.get_text_config(), "max_position_embeddings", None)
    if plan.task is None or plan.tokenizer is None or context is None:
        return None
    room = context - plan.args.max_completion_length
    lengths = _prompt_lengths(plan)
    share = float((lengths > room).mean())
    if share == 0:
        return None
    return Finding(
        "context_exceeded",
        "error" if share > 0.5 else "warning",
        f"the model has {context} positions, {plan.args.max_completion_length} of them for the completion; "
        f"{percent(share)} of {len(lengths)} prompts are longer than the other {max(room, 0)} (longest: "
        f"{lengths.max()} tokens)",
        "beyond the positions that it was trained on a model writes nonsense, without an error",
        f"--max_completion_length {context - lengths.max()}, which fits the longest prompt"
        if lengths.max() < context
        else "leave the long prompts out of the data, or take a model with a longer context",
    )


def _prompt_lengths(plan: Plan) -> np.ndarray:
    prompts, tokenizer = plan.problems["prompt"], plan.tokenizer
    assert tokenizer is not None
    if isinstance(prompts[0], str):
        return np.array([len(ids) for ids in tokenizer(prompts)["input_ids"]])
    encoded = tokenizer.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **(plan.args.chat_template_kwargs or {}),
    )
    return np.array([len(ids) for ids in encoded["input_ids"]])
