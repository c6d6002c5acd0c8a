"""The reward by math-verify: what an answer states and means is read here, mathematics is compared there."""

from __future__ import annotations

import functools
import re
from typing import Any

from .choices import letter_said, letters_of
from .reading import Reading, gold_fault, gold_text, read, same_time, time_of
from .stated import extract_answer, stated_answer, unwrap, visible
from .verifier import Judge, Unchecked, VerifiedReward

PERCENT_IN_DOLLARS = re.compile(r"\\?%\s*(\$\$?|\\\)|\\\])")
SOME_TIME = re.compile(r"\b\d{1,2}:[0-5]\d\b(?:\s*[ap]\.?m\b)?", re.IGNORECASE)


class MathReward(VerifiedReward):
    r"""1.0 where the answer that a completion states is the gold answer, as mathematics.

    Letters of a multiple choice are compared with letters, times of the day with times. A percentage is equal to
    a number of the same value and of one hundredth of it. A unit may be missing, but 3 minutes are not 3 hours.
    """

    def __init__(self, judge: Judge) -> None:
        super().__init__("math_verify", judge, column="answer")

    def verdict(self, key: Any, text: str) -> bool:
        """Whether a completion states the gold answer `key`."""
        gold, stated = _gold(gold_text(key)), stated_answer(text)
        if stated is not None:
            return self._same(gold, read(stated))
        text = visible(text).strip()
        last = text.rpartition("\n")[2].strip()
        if gold.letters:
            alone = letters_of(unwrap(text)) or letters_of(unwrap(last))
            return gold.letters == (alone or letter_said(text))
        if gold.time is not None:
            times = SOME_TIME.findall(text)
            found = time_of(times[-1]) if times else time_of(last)
            return found is not None and same_time(gold.time, found)
        answer = read(text)
        if answer.plain:
            return self._same(gold, answer)
        # behind the dollars, a percent sign is read by every version of math-verify's parser
        text = PERCENT_IN_DOLLARS.sub(r"\1 %", text)
        return self.judge.ask(gold.latex, text) or (gold.percent and self.judge.ask(_hundredth(gold), text))

    def equal(self, gold: str, answer: str) -> bool:
        """Whether one stated answer is right where another is the gold one; raises Unchecked as `verdict` does."""
        return self._same(_gold(gold), read(answer))

    def _same(self, gold: Reading, answer: Reading) -> bool:
        if gold.letters:
            small = re.fullmatch("[a-j]", answer.latex)  # a choice here, though elsewhere a variable
            return gold.letters == (answer.letters or frozenset(small[0].upper() if small else ""))
        if gold.time is not None or (answer.time is not None and answer.latex == answer.whole):
            return gold.time is not None and answer.time is not None and same_time(gold.time, answer.time)
        if gold.unit and answer.unit and gold.unit != answer.unit:
            return False
        if self._equal(gold.latex, _words(gold, answer)):
            return True
        if gold.percent != answer.percent:
            one, other = (gold, answer) if gold.percent else (answer, gold)
            hundredth = _hundredth(one)
            pair = (hundredth, other.latex) if gold.percent else (other.latex, hundredth)
            return self._equal(*pair)
        # "5 m" may be five times m, if the gold answer has no unit
        return answer.unit is not None and gold.unit is None and self._equal(gold.latex, answer.whole)

    def _equal(self, gold: str, answer: str) -> bool:
        if not answer.strip():
            return False
        return gold == answer or self.judge.ask(gold, rf"\boxed{{{answer}}}")

    def fault(self, key: Any) -> str | None:
        """Why the gold answer `key` is of no use: unreadable, or not equal to itself; None for a sound one."""
        text = extract_answer(gold_text(key))
        gold = _gold(gold_text(key))
        fault = gold_fault(gold, text)
        if fault is not None or gold.letters or gold.time is not None:
            return fault
        try:
            accepted = self.judge.ask(gold.latex, rf"\boxed{{{gold.latex}}}")
        except Unchecked as error:
            return f"{error}; write it as LaTeX, or choose the reward exact"
        return None if accepted else "math-verify does not find it equal to itself; choose the reward exact"


@functools.lru_cache(maxsize=4096)
def _gold(text: str) -> Reading:
    return read(extract_answer(text))


def _hundredth(reading: Reading) -> str:
    return rf"\frac{{{reading.latex}}}{{100}}"


def _words(gold: Reading, answer: Reading) -> str:
    """What math-verify compares of an answer: words as such only where the gold answer has words."""
    return rf"\text{{{answer.latex}}}" if answer.words and r"\text" in gold.latex else answer.latex
