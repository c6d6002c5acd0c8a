"""A task: training and evaluation problems that share no question, and the rewards that score them."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .answers import normalise
from .config import REASONING_GYM, TaskConfig
from .files import Row, is_local, read_file, read_hub
from .reading import gold_text
from .rewards import RewardFunction, exact_reward, load_rewards, math_verify_reward
from .stated import extract_answer
from .verifier import VerifiedReward

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

GENERATED_TRAIN = 4096
"""Training problems of a generated task where train_size is not given."""

HELD_OUT = 500
"""Evaluation problems where neither eval_size nor data for evaluation are given."""

EVAL_SEED = 0


@dataclass(frozen=True)
class Task:
    """Problems and rewards, ready for a trainer.

    Both data sets have the columns prompt (text, or messages), question and answer, besides those that a reward
    asks for.
    """

    name: str
    train: Dataset
    eval: Dataset
    reward_funcs: list[RewardFunction]
    fingerprint: str
    """SHA-256 of all rows of both data sets, in order."""
    majority_share: float
    """Share of the most common gold answer in `eval`: what a constant answer would score."""


def load_task(config: TaskConfig, *, seed: int) -> Task:
    """Load the problems and rewards that `config` names; `seed` chooses training problems unless task_seed does.

    Evaluation problems are held out by content: no question of theirs, up to case and white space, is left in
    the training data. Where the data come without a part for evaluation, `eval_size` distinct questions are set
    aside, the same ones for every seed.

    Raises FileNotFoundError for a missing file and ValueError for unknown names, missing columns, empty data,
    sizes that the data cannot fill, and gold answers that the chosen rewards cannot use (see
    TaskConfig.on_bad_gold).
    """
    from datasets import Dataset

    seed = seed if config.task_seed is None else config.task_seed
    train, evaluation, own = _rows(config, seed)
    rewards = load_rewards(config.rewards, own, config.reward_timeout, config.reward_fallback())

    train = _with_usable_gold(train, rewards, config, "training data")
    if evaluation is None:
        train, evaluation = _hold_out(train, config.eval_size or HELD_OUT)
    else:
        evaluation = _with_usable_gold(evaluation, rewards, config, "evaluation data")
        train = _without(train, evaluation)
    train = sample_rows(train, config.train_size, seed, "train_size")
    evaluation = sample_rows(evaluation, config.eval_size, EVAL_SEED, "eval_size")

    share = _majority_share(evaluation)
    if share > 0.5:
        logger.warning(
            "%s: one constant answer is right on %.0f %% of the evaluation problems, so a rising reward may show "
            "nothing else", config.dataset, 100 * share,
        )  # fmt: skip
    return Task(
        name=config.dataset,
        train=Dataset.from_list(train),
        eval=Dataset.from_list(evaluation),
        reward_funcs=rewards,
        fingerprint=_fingerprint(train, evaluation),
        majority_share=share,
    )


def _rows(config: TaskConfig, seed: int) -> tuple[list[Row], list[Row] | None, RewardFunction]:
    """Training rows, evaluation rows if the source has its own, and the reward that "auto" stands for."""
    train_size, eval_size = config.train_size or GENERATED_TRAIN, config.eval_size or HELD_OUT
    if config.dataset == "addition":
        from .addition import addition_reward, load_addition

        if config.chat or config.prompt_template != "{question}":
            raise ValueError("chat and prompt_template do not go with dataset addition: its model reads a+b= only")
        train_set, eval_set = load_addition(seed, train_size, eval_size)
        return train_set.to_list(), eval_set.to_list(), addition_reward

    if config.dataset.startswith(REASONING_GYM):
        from .reasoning import check_scorer, load_reasoning_gym

        train, evaluation, own = load_reasoning_gym(
            config.dataset.removeprefix(REASONING_GYM),
            config.options(),
            config.reward_timeout,
            seed=seed,
            train_size=train_size,
            eval_size=eval_size,
        )
        if "auto" in config.rewards:
            check_scorer(own, evaluation[0])
        return (
            [row | _problem(row["question"], config) for row in train],
            [row | _problem(row["question"], config) for row in evaluation],
            own,
        )

    return _given(config, config.train_split), _given_evaluation(config), math_verify_reward(config.reward_timeout)


def _given_evaluation(config: TaskConfig) -> list[Row] | None:
    if config.eval_file is not None:
        return columns_of(read_file(config.eval_file), config, config.eval_file)
    return None if config.test_split is None else _given(config, config.test_split)


def _given(config: TaskConfig, split: str) -> list[Row]:
    if is_local(config.dataset):
        if split != "train":
            raise ValueError(
                f"dataset {config.dataset!r} is a file and has no split {split!r}; name the file for evaluation "
                "by eval_file"
            )
        return columns_of(read_file(config.dataset), config, config.dataset)
    return columns_of(
        read_hub(config.dataset, config.dataset_config, split), config, f"{config.dataset}, split {split}"
    )


def columns_of(rows: list[Row], config: TaskConfig, source: str) -> list[Row]:
    """The columns that the configuration names, under their names in a Task; the answer as it stands."""
    if not rows:
        raise ValueError(f"{source}: no rows")
    found = list(dict.fromkeys(name for row in rows for name in row))
    missing = {config.question_column, config.answer_column, *config.extra_columns}.difference(found)
    if missing:
        raise ValueError(
            f"{source}: no column {', '.join(map(repr, sorted(missing)))}; it has {', '.join(map(repr, found))}. "
            "Set question_column, answer_column or extra_columns"
        )
    columns = []
    for number, row in enumerate(rows, 1):
        question = row.get(config.question_column)
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{source}, row {number}: the question must be text, not {question!r}")
        extras = {name: row.get(name) for name in config.extra_columns}
        columns.append(_problem(question, config) | {"answer": row.get(config.answer_column)} | extras)
    return columns


def _problem(question: str, config: TaskConfig) -> Row:
    # str.format would trip over the braces of LaTeX in a template
    text = config.prompt_template.replace("{question}", question)
    if not config.chat:
        return {"prompt": text, "question": question}
    system = [] if config.system_prompt is None else [{"role": "system", "content": config.system_prompt}]
    return {"prompt": [*system, {"role": "user", "content": text}], "question": question}


def _with_usable_gold(
    rows: list[Row], rewards: list[RewardFunction], config: TaskConfig, source: str
) -> list[Row]:
    """The rows with their gold answers as text; the first unusable one raises, or all of them are dropped."""
    from tqdm.auto import tqdm

    verifiers = [r for r in rewards if isinstance(r, VerifiedReward) and r.column == "answer"]
    needed = bool(verifiers) or exact_reward in rewards or not config.dataset.startswith(REASONING_GYM)

    @functools.cache
    def fault_of(text: str) -> str | None:
        for reward in verifiers:
            fault = reward.fault(text)
            if fault is not None:
                return fault
        return None

    usable: list[Row] = []
    bad: list[str] = []
    # the first seconds show nothing, for most sets are read by then
    progress = tqdm(rows, desc=f"gold answers, {source}", unit="row", delay=3, leave=False, disable=not verifiers)
    for number, row in enumerate(progress, 1):
        fault, text = None, ""
        try:
            text = gold_text(row["answer"])
        except ValueError as error:
            fault = str(error)
        if fault is None:
            fault = fault_of(text) if text.strip() else "it is empty" if needed else None
        if fault is None:
            usable.append(row | {"answer": text})
        else:
            bad.append(f"row {number}: {row['answer']!r} ({fault})")
    if bad and config.on_bad_gold == "raise":
        raise ValueError(
            f"{config.dataset}, {source}: {len(bad)} of {len(rows)} gold answers cannot be used; the first is "
            f"{bad[0]}. Repair them, choose another reward, or set on_bad_gold to drop"
        )
    if bad:
        logger.warning(
            "%s, %s: dropped %d of %d rows for their gold answers; the first is %s",
            config.dataset, source, len(bad), len(rows), bad[0],
        )  # fmt: skip
    if not usable:
        raise ValueError(f"{config.dataset}, {source}: no row has a gold answer that can be used")
    return usable


def _hold_out(rows: list[Row], size: int) -> tuple[list[Row], list[Row]]:
    """Set `size` distinct questions aside; all rows with one of these questions leave the training data."""
    by_content = {normalise(row["question"]): row for row in reversed(rows)}
    if len(by_content) <= size:
        raise ValueError(
            f"cannot hold out {size} of {len(by_content)} distinct questions and train on the others; "
            "lower eval_size"
        )
    chosen = random.Random(EVAL_SEED).sample(sorted(by_content), size)
    held_out = set(chosen)
    return [r for r in rows if normalise(r["question"]) not in held_out], [by_content[key] for key in chosen]


def _without(train: list[Row], evaluation: list[Row]) -> list[Row]:
    held_out = {normalise(row["question"]) for row in evaluation}
    kept = [row for row in train if normalise(row["question"]) not in held_out]
    if not kept:
        raise ValueError("every question of the training data is one of the evaluation data")
    if len(kept) < len(train):
        logger.warning(
            "dropped %d of %d training rows whose questions are evaluation questions",
            len(train) - len(kept), len(train),
        )  # fmt: skip
    return kept


def sample_rows(rows: list[Row], size: int | None, seed: int, option: str) -> list[Row]:
    """`size` of the rows, in their order; all of them for None."""
    if size is None:
        return rows
    if size > len(rows):
        raise ValueError(f"{option} is {size}, but there are {len(rows)} rows; lower it")
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), size))]


def _majority_share(rows: list[Row]) -> float:
    golds = Counter(normalise(extract_answer(row["answer"])) for row in rows if row["answer"])
    return max(golds.values(), default=0) / len(rows)


def _fingerprint(*parts: list[Row]) -> str:
    digest = hashlib.sha256()
    for rows in parts:
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()
