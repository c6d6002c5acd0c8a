"""Addition with a correction: the embedded environment.

The model sees ``347+586=`` and writes columns and sum, as in `hapo.tasks.addition`. After a wrong answer it is
told which of its columns are wrong, from the right, 4 for the sum, and sees the problem again:

    347+586=7+6=13;4+8+1=13;3+5+1=8;833      answer: !3,4;347+586=

A column is wrong if it is not the one of the worked answer, so that one forgotten carry is named where it is. An
answer with another number of columns is told ``!?;`` in their place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..addition import load_addition, prompt, solution

if TYPE_CHECKING:
    from datasets import Dataset

MAX_NEW_TOKENS = 32
"""Token limit of a turn: the longest right answer has 29 characters and one end-of-sequence token."""


class AdditionEnvironment:
    """A sum in at most `max_turns` tries; the reward of a turn is 1 where its sum is right, else 0.

    Deterministic. Nothing is stripped or parsed: ``0933`` and ``933 `` are wrong, whatever the columns say. The
    columns are not rewarded.

    Raises:
        ValueError: max_turns < 1.
    """

    def __init__(self, max_turns: int = 3) -> None:
        if max_turns < 1:
            raise ValueError(f"max_turns must be at least 1, got {max_turns}")
        self.max_turns = max_turns
        self.reward, self.done = 0.0, True
        self._problem, self._worked, self._turns = "", "", 0

    def reset(self, **row: Any) -> str | None:
        """Begin with the `question` of a row, such as ``347+586``; its prompt says it all."""
        a, b = (int(x) for x in row["question"].split("+"))
        self._problem, self._worked, self._turns = prompt(a, b), solution(a, b), 0
        self.reward, self.done = 0.0, False
        return None

    def answer(self, text: str) -> str:
        """Answer the problem.

        Args:
            text: The columns from the right, each ended by a semicolon, then the sum.

        Returns:
            Nothing after a right answer or the last try; else which columns are wrong, and the problem again.
        """
        if self.done:
            raise RuntimeError("the episode is over: call reset before another answer")
        self._turns += 1
        given, worked = text.split(";"), self._worked.split(";")
        right = given[-1] == worked[-1]
        self.reward = float(right)
        self.done = right or self._turns >= self.max_turns
        if self.done:
            return ""
        wrong = [str(i) for i, (x, y) in enumerate(zip(given, worked, strict=False), 1) if x != y]
        return f"!{','.join(wrong) if len(given) == len(worked) else '?'};{self._problem}"

    def get_reward(self) -> float:
        """The reward of the last turn, which is that of the episode."""
        return self.reward


def load(seed: int, train_size: int, eval_size: int) -> tuple[type[AdditionEnvironment], Dataset, Dataset]:
    """The environment with its training and held-out problems: see `load_addition`."""
    return AdditionEnvironment, *load_addition(seed, train_size, eval_size)
