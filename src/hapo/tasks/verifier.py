"""Verified rewards: answers are judged in a process of their own, which may be ended at any moment.

Model output is hostile without meaning to be: ``10**10**10``, ten thousand nested fractions. math-verify guards
itself by signals, which work in the main thread only and do not interrupt arithmetic on huge integers, and
reasoning-gym's scorers have no guard at all. So the judging process is a script of its own, reused over calls, and
replaced when it dies.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .answers import Completion, text_of
from .process import Worker

logger = logging.getLogger(__name__)


class Unchecked(Exception):
    """An answer could not be judged; the message says why."""


class Judge(Worker):
    """The judging process, replaced after a time-out or a crash.

    `kind` is "math_verify" or "reasoning_gym", `timeout` the seconds allowed for one answer, `setup` what the
    kind needs besides.
    """

    def __init__(self, kind: str, timeout: float, **setup: Any) -> None:
        super().__init__(
            f"the verifier {kind!r}",
            Path(__file__).with_name("_worker.py"),
            {"kind": kind, "timeout": timeout, **setup},
            os.environ | {"PYTHONHASHSEED": "0"},  # generators that draw from sets repeat themselves
        )
        self._timeout = timeout

    def ask(self, key: str, text: str) -> bool:
        """Whether `text` is a right answer to the problem that `key` names; raises as `call` does."""
        return self.call("judge", key, text)

    def call(self, method: str, *arguments: str) -> Any:
        """What a method of the process returns.

        Raises Unchecked if it takes longer than the time-out, crashes or raises; RuntimeError if the process
        cannot be started.
        """
        message = self.answer({"method": method, "arguments": arguments})
        if message is None:
            raise Unchecked(f"no verdict within {self._timeout:g} s, or the verifier crashed")
        if "error" in message:
            raise Unchecked(message["error"])
        return message["result"]


class VerifiedReward:
    """Reward in TRL's signature: 1.0 for a right answer, 0.0 for a wrong one or one that cannot be checked.

    An answer that cannot be checked (time-out, crash, an exception in the scorer) is not verified, so it earns
    nothing; it is never passed over in silence: a warning gives the number and one reason, and TRL's
    `log_metric` receives the share of unchecked answers as ``NAME/unchecked``.

    `column` is the data-set column that tells `judge` the problem. `extract_key` and `extract` make of that
    column and of the completion's text what the judge reads.
    """

    def __init__(
        self,
        name: str,
        judge: Judge,
        column: str,
        *,
        extract_key: Callable[[str], str] = str,
        extract: Callable[[str], str] = str,
    ) -> None:
        self.__name__ = name
        self.judge = judge
        self.column = column
        self._extract_key = extract_key
        self._extract = extract

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Completion],
        *,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Score a batch."""
        rewards, faults = [], []
        for key, completion in zip(columns[self.column], completions, strict=True):
            try:
                right = self.verdict(key, text_of(completion))
            except Unchecked as error:
                right = False
                faults.append(str(error))
            rewards.append(float(right))
        if faults:
            logger.warning(
                "%s: %d of %d answers could not be checked and score 0 (the first: %s)",
                self.__name__, len(faults), len(rewards), faults[0],
            )  # fmt: skip
        if log_metric is not None and rewards:
            log_metric(f"{self.__name__}/unchecked", len(faults) / len(rewards))
        return rewards

    def verdict(self, key: Any, text: str) -> bool:
        """Whether a completion answers the problem `key`; raises Unchecked where that cannot be told."""
        return self.judge.ask(self._extract_key(key), self._extract(text))

    def fault(self, key: str) -> str | None:
        """Why no answer to the problem `key` could ever be checked; None for a sound problem."""
        try:
            self.judge.ask(self._extract_key(key), "")
        except Unchecked as error:
            return str(error)
        return None
