"""A task: training and evaluation problems that share no question, and the rewards that score them."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .answers import normalise
from .columns import columns_of, problem_columns
from .config import REASONING_GYM, TaskConfig
from .curriculum import in_stages
from .demonstrations import load_demonstrations
from .files import Row, data_files, is_local, read_hub, read_local
from .reading import gold_text
from .reward_options import TokenRewardOptions
from .rewards import RewardFunction, exact_reward, load_rewards, math_verify_reward
from .stated import extract_answer
from .table import dataset_of
from .verifier import VerifiedReward

if TYPE_CHECKING:
    from datasets import Dataset

    from .environments import EnvironmentTask
    from .token_reward import ModelReward, TokenReward

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
    asks for; a value in them is as it was written (`dataset_of`), a gold answer is text.
    """

    name: str
    train: Dataset
    eval: Dataset
    reward_funcs: list[RewardFunction]
    fingerprint: str
    """SHA-256 of all rows of both data sets, in order."""
    demonstrations: Dataset | None = field(default=None, kw_only=True)
    """To learn from beside rollouts; columns prompt, completion and question."""
    majority_share: float
    """Share of the most common gold answer in `eval`: what a constant answer would score."""
    token_reward: TokenReward | None = field(default=None, kw_only=True)
    """What trains, where the recipe says so; `reward_funcs` then measure alone."""
    staged: bool = False
    """Whether `train` has the column `stage`, from a curriculum."""
    environment: EnvironmentTask | None = field(default=None, kw_only=True)
    """Where episodes of several turns are played; None: an answer is one turn."""


def load_task(config: TaskConfig, *, seed: int) -> Task:
    """Load the problems and rewards that `config` names; `seed` chooses training problems unless task_seed does.

    Evaluation problems are held out by content: no question of theirs, up to case and white space, is left in
    the training data. Where the data come without a part for evaluation, `eval_size` distinct questions are set
    aside, the same ones for every seed.

    Raises FileNotFoundError for a missing file and ValueError for unknown names, missing columns, empty data,
    sizes that the data cannot fill, a curriculum of other problems, and gold answers that the chosen rewards
    cannot use (see TaskConfig.on_bad_gold).
    """
    seed = seed if config.task_seed is None else config.task_seed
    if config.environment is not None:
        return _episodes(config, seed)
    train, evaluation, own = _rows(config, seed)
    token_reward, of_model = _token_reward(config)
    rewards = load_rewards(config.rewards, own, config.reward_timeout, config.reward_fallback(), of_model)

    train = _with_usable_gold(train, rewards, config, "training data")
    if evaluation is None:
        train, evaluation = _hold_out(train, config.eval_size or HELD_OUT)
    else:
        evaluation = _with_usable_gold(evaluation, rewards, config, "evaluation data")
        train = _without(train, evaluation)
    train = sample_rows(train, config.train_size, seed, "train_size")
    if config.curriculum is not None:
        train = in_stages(train, config.curriculum)
    evaluation = sample_rows(evaluation, config.eval_size, EVAL_SEED, "eval_size")

    share = _majority_share(evaluation)
    if share > 0.5:
        logger.warning(
            "%s: one constant answer is right on %.0f %% of the evaluation problems, so a rising reward may show "
            "nothing else", config.dataset, 100 * share,
        )  # fmt: skip
    return Task(
        name=config.dataset,
        train=dataset_of(train),
        eval=dataset_of(evaluation),
        reward_funcs=rewards,
        fingerprint=_fingerprint(train, evaluation),
        majority_share=share,
        token_reward=token_reward,
        staged=config.curriculum is not None,
        demonstrations=load_demonstrations(config, (row["question"] for row in evaluation), seed=seed),
    )


def _episodes(config: TaskConfig, seed: int) -> Task:
    """The task of an environment: its rows, and as reward that of the last turn of an episode."""
    from .environments import load_environment
    from .environments.episodes import episode_reward

    assert config.environment is not None
    assert not isinstance(config.environment_options, str)
    environment = load_environment(
        config.environment,
        seed=seed,
        train_size=config.train_size or GENERATED_TRAIN,
        eval_size=config.eval_size or HELD_OUT,
        options=config.environment_options,
    )
    return Task(
        name=f"environment {environment.name}",
        train=environment.train,
        eval=environment.eval,
        reward_funcs=[episode_reward],
        fingerprint=_fingerprint(environment.train.to_list(), environment.eval.to_list()),
        majority_share=0.0,
        environment=environment,
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
            [row | problem_columns(row["question"], config, config.dataset) for row in train],
            [row | problem_columns(row["question"], config, config.dataset) for row in evaluation],
            own,
        )

    given = sources(config)
    return (
        columns_of(given.training, config),
        None if given.evaluation is None else columns_of(given.evaluation, config),
        math_verify_reward(config.reward_timeout),
    )


def _token_reward(config: TaskConfig) -> tuple[TokenReward | None, ModelReward | None]:
    """The reward per token, and that of whole answers by the same model, which is loaded once."""
    if config.token_reward is None:
        return None, None
    from .token_reward import ModelReward, TokenReward  # with torch, which who reads a run does without

    options = TokenRewardOptions.read(config.token_reward)
    return TokenReward(options), ModelReward(options)


@dataclass(frozen=True)
class Sources:
    """The rows of files or of the Hub as they stand there, by the name of their source."""

    training: dict[str, list[Row]]
    evaluation: dict[str, list[Row]] | None
    """None where the data come without a part for evaluation."""


def sources(config: TaskConfig) -> Sources:
    """The rows that `dataset`, its splits and `eval_file` name; raises as `read_local` does."""
    training = _split(config, config.train_split)
    evaluation: dict[str, list[Row]] | None = None
    if config.eval_file is not None:
        evaluation = read_local(config.eval_file, None)
    elif config.test_split is not None:
        evaluation = _split(config, config.test_split)
    folder = Path(config.dataset).expanduser()
    if folder.is_dir():
        left_out = {str(file) for file in data_files(folder)}.difference(training, evaluation or ())
        if left_out:
            logger.warning(
                "%s: read are %s; left out are %s (train_split and test_split choose)",
                config.dataset, *(", ".join(Path(name).name for name in sorted(n)) for n in (training, left_out)),
            )  # fmt: skip
    return Sources(training, evaluation)


def _split(config: TaskConfig, split: str) -> dict[str, list[Row]]:
    if not is_local(config.dataset):
        return {f"{config.dataset}, split {split}": read_hub(config.dataset, config.dataset_config, split)}
    if split != "train" and not Path(config.dataset).expanduser().is_dir():
        raise ValueError(
            f"dataset {config.dataset!r} is a file and has no split {split!r}; name the file for evaluation "
            "by eval_file"
        )
    return read_local(config.dataset, split)


def _with_usable_gold(
    rows: list[Row], rewards: list[RewardFunction], config: TaskConfig, source: str
) -> list[Row]:
    """The rows with their gold answers as text; the first unusable one raises, or all of them are dropped.

    A list or an object stays what it is where none but the user's own rewards read it.
    """
    from tqdm.auto import tqdm

    verifiers = [r for r in rewards if isinstance(r, VerifiedReward) and r.column == "answer"]
    compared = bool(verifiers) or exact_reward in rewards
    needed = config.needs_answers and (compared or not config.dataset.startswith(REASONING_GYM))

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
        if isinstance(row["answer"], list | dict) and row["answer"] and not compared:
            usable.append(row)  # the user's own reward knows how to read it
            continue
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
    answers = [row["answer"] for row in rows]
    golds = Counter(normalise(extract_answer(a)) if isinstance(a, str) else json.dumps(a) for a in answers if a)
    return max(golds.values(), default=0) / len(rows)


def _fingerprint(*parts: list[Row]) -> str:
    digest = hashlib.sha256()
    for rows in parts:
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()
