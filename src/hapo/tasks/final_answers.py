"""The final answers of completions to one prompt, and whether two of them are the same, without a gold answer."""

from __future__ import annotations

import re
from typing import Literal, Protocol

from .addition import addition_reward
from .answers import normalise
from .maths import MathReward
from .reading import canonical_number, read
from .rewards import RewardFunction, math_verify_reward
from .stated import extract_answer, stated_answer, unwrap, visible
from .verifier import Unchecked

Equality = Literal["auto", "math_verify", "exact"]


class AnswerSpace(Protocol):
    """Answers to the problems of a task."""

    def canonical(self, text: str) -> str | None:
        """The answer that a completion gives, in its canonical form; None where there is none."""

    def same(self, one: str, other: str) -> bool:
        """Whether `other` is right where `one` is the gold answer; both in canonical form."""


class ExactAnswers:
    """As the reward `exact` compares: up to case, white space, and how a number is written."""

    def canonical(self, text: str) -> str | None:
        """What the completion states, or all of it where it states nothing; None for nothing."""
        answer = unwrap(extract_answer(text))
        return canonical_number(answer) or normalise(answer) or None

    def same(self, one: str, other: str) -> bool:
        """Never: equal answers have one canonical form."""
        return False


class Sums(ExactAnswers):
    """Of the embedded task: what follows the last semicolon."""

    def canonical(self, text: str) -> str | None:
        """The digits there, if it is digits; a sum with a zero before it is another answer, as in the reward."""
        last = text.rpartition(";")[2]
        return last if re.fullmatch(r"[0-9]+", last) else None


class MathAnswers:
    """As the reward `math_verify` compares an answer with a gold one, either of the two as the gold one.

    That is no equivalence: 50 % is 50 and is 0.5, and 3 is 3 minutes and is 3 hours. `answer_clusters` makes it
    one. A pair that cannot be compared (a time-out, a crash) is not the same.
    """

    def __init__(self, reward: MathReward) -> None:
        self._reward = reward

    def canonical(self, text: str) -> str | None:
        """The answer that the completion states, else the last that math-verify finds; a number by its value."""
        stated = stated_answer(text)
        if stated is None:
            plain = read(visible(text).strip())
            stated = plain.latex if plain.plain else self._last(visible(text))
        if not (stated or "").strip():
            return None
        assert stated is not None
        reading = read(stated)
        if reading.words:
            return normalise(stated)
        bare = not (reading.percent or reading.unit is not None or reading.letters or reading.time)
        return reading.latex if bare and reading.latex.strip() else unwrap(stated)

    def same(self, one: str, other: str) -> bool:
        """Whether the reward gives 1 to a completion that states `other`, for the gold answer `one`."""
        try:
            return self._reward.equal(one, other)
        except Unchecked:
            return False

    def _last(self, text: str) -> str | None:
        try:
            found: str | None = self._reward.judge.call("last", text)
        except Unchecked:
            return None
        return found


def answer_space(equality: Equality, rewards: list[RewardFunction], timeout: float) -> AnswerSpace:
    """How answers to a task are read and compared; "auto": by math-verify where one of its rewards does."""
    if equality == "math_verify" or (equality == "auto" and any(isinstance(r, MathReward) for r in rewards)):
        return MathAnswers(math_verify_reward(timeout))
    return Sums() if equality == "auto" and addition_reward in rewards else ExactAnswers()
