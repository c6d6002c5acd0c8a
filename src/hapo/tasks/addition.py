"""Three-digit addition with written carries: the embedded default task.

The model sees ``347+586=`` and adds column by column from the right, writing a carry of 1 as a third summand,
then the sum after the last semicolon:

    347+586=7+6=13;4+8+1=13;3+5+1=9;933

Every column holds several decisions (which digits, carry or not, the column's sum), and a wrong one changes the
length of the answer. No answer is common: there are about 1,800 sums.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

LOW, HIGH = 100, 999
"""Smallest and largest summand."""

MAX_COMPLETION = 32
"""Token limit of a completion: the longest right answer has 29 characters and one end-of-sequence token."""

HELD_OUT_SHARE = 0.1
"""Share of all unordered pairs that only evaluation may use."""

EVAL_SEED = 0


def held_out(a: int, b: int) -> bool:
    """Whether the problem a + b, which is also b + a, belongs to evaluation.

    Decided by SHA-256 of the unordered pair, so that warm-up, training and evaluation share one rule that no
    seed changes.
    """
    low, high = sorted((a, b))
    digest = hashlib.sha256(f"{low}+{high}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def prompt(a: int, b: int) -> str:
    """What the model sees: ``a+b=``."""
    return f"{a}+{b}="


def solution(a: int, b: int) -> str:
    """The worked answer to a + b, two numbers with the same number of digits.

    Columns from the right, ``digit+digit[+1]=sum;`` each, then the sum.
    """
    x, y = str(a), str(b)
    if len(x) != len(y):
        raise ValueError(f"{a} and {b} differ in their number of digits; a worked answer needs equal numbers")
    columns, carry = [], 0
    for p, q in zip(reversed(x), reversed(y), strict=True):
        total = int(p) + int(q) + carry
        columns.append(f"{p}+{q}{'+1' if carry else ''}={total};")
        carry = total // 10
    return "".join(columns) + str(a + b)


def draw_problems(rng: random.Random, size: int, *, evaluation: bool) -> list[tuple[int, int]]:
    """`size` problems, no two the same up to order, all on one side of the split.

    A smaller size gives a prefix of a larger one.
    """
    summands = HIGH - LOW + 1
    share = HELD_OUT_SHARE if evaluation else 1 - HELD_OUT_SHARE
    limit = int(share * summands * (summands + 1) / 2) // 2  # half of that side, so that rejection stays quick
    if not 0 <= size <= limit:
        raise ValueError(f"cannot draw {size} distinct problems; choose a size between 0 and {limit}")
    problems: dict[tuple[int, int], tuple[int, int]] = {}
    while len(problems) < size:
        a, b = rng.randint(LOW, HIGH), rng.randint(LOW, HIGH)
        if held_out(a, b) == evaluation:
            problems.setdefault((min(a, b), max(a, b)), (a, b))
    return list(problems.values())


def load_addition(seed: int, train_size: int, eval_size: int) -> tuple[Dataset, Dataset]:
    """Training and evaluation problems, with columns prompt (what the model sees), question and answer (the sum).

    `seed` chooses the training problems. The evaluation problems are the same for every seed, so that runs are
    measured alike; none of them, in either order, is ever a training problem.
    """
    train = draw_problems(random.Random(seed), train_size, evaluation=False)
    evaluation = draw_problems(random.Random(EVAL_SEED), eval_size, evaluation=True)
    return _dataset(train), _dataset(evaluation)


def _dataset(problems: list[tuple[int, int]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "prompt": [prompt(a, b) for a, b in problems],
            "question": [f"{a}+{b}" for a, b in problems],
            "answer": [str(a + b) for a, b in problems],
        }
    )


def addition_reward(prompts: list[str], completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """1.0 where the text after the last semicolon is exactly the sum, else 0.0.

    An outcome reward: the written columns are not checked, so a right sum after a wrong column counts, and so
    does a sum without columns. Nothing is stripped or parsed: ``0933``, ``933;`` and ``933 `` are wrong.
    """
    return [
        1.0 if completion.rpartition(";")[2] == gold else 0.0
        for completion, gold in zip(completions, answer, strict=True)
    ]


def parts_right(a: int, b: int, completion: str) -> float:
    """Share of the parts of an answer that are right: its columns, each in its place, and the sum.

    Parts end at semicolons. The right answer has n columns and the sum, and an answer of more parts is divided by
    their number: in [0, 1], and 1 for `solution(a, b)` alone. The embedded reward model learns it.
    """
    right, given = solution(a, b).split(";"), completion.split(";")
    found = sum(one == other for one, other in zip(right, given, strict=False))
    return found / max(len(right), len(given))


def wrong_places(a: int, b: int, completion: str) -> list[int]:
    """The characters that make `parts_right` less than 1, where each can be named: those that differ from the
    right answer in an answer as long as it, or [] where it is shorter or longer."""
    right = solution(a, b)
    if len(completion) != len(right):
        return []
    return [i for i, (one, other) in enumerate(zip(right, completion, strict=True)) if one != other]
