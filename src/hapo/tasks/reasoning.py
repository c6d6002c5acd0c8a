"""Tasks of reasoning-gym (tested with 0.1.25, whose `__version__` says 0.1.19), scored exactly.

reasoning-gym's scorers pay partial credit: the default one for any text that contains the answer, others for
half-right solutions. Here an answer is right at full score only, and wrong otherwise.
"""

from __future__ import annotations

import difflib
import json
import random
from typing import Any

from ._worker import built_options
from .answers import normalise
from .files import Row
from .stated import extract_answer
from .verifier import Judge, Unchecked, VerifiedReward

EVAL_SEED = 0
FIRST_TRAIN_SEED = 2**20
"""Entry i of a data set comes from seed + i, so neighbouring seeds share nearly all entries."""

ATTEMPTS = 4
"""How many entries are drawn for each one wanted, before a task counts as too small."""

UNREPEATABLE = {
    "codeio": "it runs programs that ask for the time, for random bytes and for addresses in memory",
}
"""Tasks of which problems differ between two processes whatever is done (of codeio 6 in 1500), and why.

bench/gym_repeats.py measures it for all tasks. intermediate_integration, isomorphic_strings, knight_swap,
polynomial_multiplication, ransom_note and word_ladder follow the hash seed, and list_functions the generator of
`random`; the process that makes and judges problems (`Judge`) holds both.
"""

ABSURD = "#?#"
"""An answer that is right in no task."""


def load_reasoning_gym(
    name: str, options: dict[str, Any], timeout: float, *, seed: int, train_size: int, eval_size: int
) -> tuple[list[Row], list[Row], VerifiedReward]:
    """Training rows, evaluation rows and the reward of a reasoning-gym task.

    Columns are question, answer (empty in the tasks that come without one, such as rubiks_cube) and entry, by
    which the scorer finds the original entry again and knows its question. `seed` chooses the training problems;
    the evaluation problems are the same for every seed, all different, and none of their questions is a training
    question. The reward is 1.0 where the task's own scorer gives the completion's final answer (`extract_answer`)
    full score, else 0.0; `timeout` is in seconds an answer, see VerifiedReward.

    Raises ValueError for an unknown task, with the nearest names, for options that it refuses, and for sizes
    that it cannot fill.
    """
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"reasoning-gym has no task {name!r}{hint}")
    parts = _parts(options)
    for part in UNREPEATABLE.keys() & {name, *parts}:
        raise ValueError(
            f"reasoning-gym task {part!r} makes other problems in every process, so that ranks and resumed runs "
            f"would train on different ones: {UNREPEATABLE[part]}. Write problems of it into a file, and set "
            "dataset to that"
        )
    reserved = {"seed", "size"} & options.keys()
    if reserved:
        raise ValueError(f"task_options sets {', '.join(sorted(reserved))}; use task_seed, train_size, eval_size")
    try:
        create_dataset(name, **built_options(options))
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"reasoning-gym task {name!r} refuses the options {options}: {error}") from error

    judge = Judge("reasoning_gym", timeout, name=name, options=options)
    try:
        evaluation = _draw(judge, EVAL_SEED, eval_size, held_out=set(), distinct=True)
        train_seed = random.Random(seed).randrange(FIRST_TRAIN_SEED, 2**31)
        held_out = {normalise(row["question"]) for row in evaluation}
        train = _draw(judge, train_seed, train_size, held_out, distinct=False)
    except (Unchecked, ValueError) as error:
        raise ValueError(f"reasoning-gym task {name!r}: {error}") from error
    return train, evaluation, VerifiedReward(name, judge, column="entry", extract=extract_answer)


def _parts(options: dict[str, Any]) -> list[str]:
    """The tasks of a mixture ("composite"); none of another task.

    Raises:
        ValueError: parts that cannot be told apart, or whose problems would be the same for training and
            evaluation.
    """
    given = options.get("datasets", [])
    if not isinstance(given, list) or not all(isinstance(part, dict) for part in given):
        raise ValueError(
            "task_options: datasets must be a list of mappings such as "
            f'{{"name": "chain_sum", "weight": 1, "config": {{}}}}, got {given!r}'
        )
    names = [part.get("name") for part in given]
    if twice := sorted({str(name) for name in names if names.count(name) > 1}):
        raise ValueError(
            f"task_options: datasets holds {', '.join(twice)} twice, and reasoning-gym keeps one of them"
        )
    for part in given:
        if reserved := sorted({"seed", "size"} & dict(part.get("config") or {}).keys()):
            raise ValueError(
                f"task_options: the config of {part.get('name')} sets {', '.join(reserved)}; use task_seed, "
                "train_size, eval_size"
            )
    return names


def _draw(judge: Judge, seed: int, size: int, held_out: set[str], *, distinct: bool) -> list[Row]:
    attempts = ATTEMPTS * size
    rows: list[Row] = []
    for index in range(attempts):
        key = json.dumps([seed, attempts, index])
        problem = judge.call("problem", key)
        content = normalise(problem["question"])
        if content in held_out:
            continue
        if distinct:
            held_out.add(content)
        entry = json.dumps([seed, attempts, index, problem["digest"]])
        rows.append({"question": problem["question"], "answer": problem["answer"] or "", "entry": entry})
        if len(rows) == size:
            return rows
    raise ValueError(
        f"only {len(rows)} of {size} problems wanted in {attempts} draws; ask for fewer (train_size, eval_size) "
        "or set task_options to a larger space"
    )


def check_scorer(reward: VerifiedReward, row: Row) -> None:
    """Raise ValueError if the task's scorer rejects the gold answer of `row` or accepts an absurd one."""
    task, key, gold = f"the scorer of reasoning-gym task {reward.__name__!r}", row["entry"], row["answer"]
    if gold and not reward.judge.ask(key, gold):
        raise ValueError(f"{task} rejects the gold answer {gold!r} of its own problem; choose other rewards")
    try:
        fooled = reward.judge.ask(key, ABSURD)
    except Unchecked:  # scorers may raise on what is no answer
        return
    if fooled:
        raise ValueError(f"{task} accepts any text, such as {ABSURD!r}; choose other rewards, such as exact")
