"""Addition column by column: the embedded environment, made for the bundled tiny model.

The model sees ``347+586=`` and adds one column a turn, from the right, with a carry of 1 as a third summand; the
last turn is the sum. A turn ends with a semicolon or the end of sequence:

    347+586=   7+6=13;   4+8+1=13;   3+5+1=9;   933

A wrong turn ends the episode. So every turn needs those before it, and only the last one is rewarded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ..addition import load_addition, solution

if TYPE_CHECKING:
    from datasets import Dataset


class AdditionEnvironment:
    """The columns of a sum and then the sum, a turn each; the reward of the right sum is 1, of any other turn 0.

    Deterministic. Nothing is stripped or parsed: ``0933`` and ``933 `` are wrong, and a column is right if it is
    the one of `hapo.tasks.addition.solution`.
    """

    stop: ClassVar = (";",)
    """Tokens that end a turn, beside the end of sequence."""

    def __init__(self) -> None:
        self.max_turns = 0
        self.reward, self.done = 0.0, True
        self._left: list[str] = []

    def reset(self, **row: Any) -> str | None:
        """Begin with the `question` of a row, such as ``347+586``; its prompt says it all."""
        self._left = solution(*(int(x) for x in row["question"].split("+"))).split(";")
        self.max_turns = len(self._left)
        self.reward, self.done = 0.0, False
        return None

    def answer(self, text: str) -> str:
        """Add the next column, or write the sum after the last one.

        Args:
            text: A column as 4+8+1=13 with a semicolon behind it, or the sum.

        Returns:
            Nothing: a wrong turn ends the episode, and after a right one the next column is asked for.
        """
        if self.done:
            raise RuntimeError("the episode is over: call reset before another answer")
        right = self._left.pop(0)
        self.done = not self._left or text != right + ";"
        self.reward = float(not self._left and text == right)
        return ""

    def get_reward(self) -> float:
        """The reward of the last turn, which is that of the episode."""
        return self.reward


def load(seed: int, train_size: int, eval_size: int) -> tuple[type[AdditionEnvironment], Dataset, Dataset]:
    """The environment with its training and held-out problems: see `load_addition`."""
    return AdditionEnvironment, *load_addition(seed, train_size, eval_size)
