"""The process that judges answers: runs as a script, one JSON object a line in and out, no import of hapo.

The first line on standard input, ``{"kind": ..., "timeout": seconds, ...}``, sets it up and is answered by
``{"result": null}``; every further line, ``{"method": ..., "arguments": [...]}``, by ``{"result": ...}``; either
by ``{"error": str}`` if it fails. A call that takes longer than the time-out ends the process: a watchdog in C
does it, so that arithmetic on huge integers, which never comes back to the interpreter, is no exception.
"""

import faulthandler
import functools
import hashlib
import json
import os
import random
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

MEMORY_LIMIT = 4 << 30
"""Address space in bytes (Linux only): an answer such as 10**10**10 must not take the machine with it."""

LETTERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
LETTERS_MEANT = re.compile(r"\\(text|textbf|mathrm|mbox|operatorname|begin|end)\s*\{[^}]*\}")
DELIMITERS = re.compile(r"(?<!\\)\$|\\boxed")


class MathVerify:
    """Judges by math-verify; a problem is its gold answer."""

    def __init__(self) -> None:
        from math_verify import parse, verify

        self.parse, self.verify = parse, verify
        self.gold = functools.lru_cache(maxsize=4096)(self._gold)
        self.judge("1", "1")  # the parser loads its grammar at the first call, which is not the answers' time

    def judge(self, gold: str, text: str) -> bool:
        """Whether the whole completion `text` comes to the gold answer."""
        answer = self.parse(text, parsing_timeout=None)
        return self.verify(self.gold(gold), answer, timeout_seconds=None)

    def last(self, text: str) -> str | None:
        """The text of the expression that `judge` would compare of a completion; None where there is none."""
        answer = self.parse(text, parsing_timeout=None)
        return next((part for part in reversed(answer) if isinstance(part, str) and part), None)

    def _gold(self, gold: str) -> list[Any]:
        if LETTERS.search(LETTERS_MEANT.sub("", gold)):
            # 'yes' would be read as y*e*s, and 'sey' would equal it
            raise ValueError("math-verify reads a word as a product of letters")
        text = gold if DELIMITERS.search(gold) else f"\\boxed{{{gold}}}"
        parsed = self.parse(text, fallback_mode="no_fallback", parsing_timeout=None)
        if not parsed:
            raise ValueError("math-verify finds no expression in it")
        return parsed


class ReasoningGym:
    """Makes a reasoning-gym task's entries and judges by its scorer; a problem is "[seed, size, index, digest]".

    Both happen here, because several tasks score by metadata that JSON cannot carry (tuples), and because
    some draw from sets, whose order is the same in two processes only if both hash strings alike (PYTHONHASHSEED
    is 0 here). Others draw from the generators that all of a process shares, so these are seeded for each entry.
    A question whose digest is not that of the key is another one than was asked; then nothing is judged.
    """

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        import reasoning_gym

        options = built_options(options)

        @functools.lru_cache(maxsize=8)
        def dataset(seed: int, size: int) -> Any:
            seed_shared_generators(seed)
            return reasoning_gym.create_dataset(name, seed=seed, size=size, **options)

        @functools.lru_cache(maxsize=1024)
        def entry(key: str) -> tuple[Any, dict[str, Any]]:
            seed, size, index, *digest = json.loads(key)
            problems = dataset(seed, size)
            seed_shared_generators(seed + index)
            made = problems[index]
            if digest and digest != [digest_of(made["question"])]:
                raise ValueError("reasoning-gym made another question of this entry than was asked")
            return problems, made

        self._entry = entry

    def problem(self, key: str) -> dict[str, Any]:
        """Question with its digest and gold answer, None in the tasks that have none."""
        _, entry = self._entry(key)
        question = entry["question"]
        return {"question": question, "answer": entry["answer"], "digest": digest_of(question)}

    def judge(self, key: str, text: str) -> bool:
        """Whether the task's own scorer gives the answer `text` full score, no less and no more.

        Above 1 is spell_backward's word with other text behind it.
        """
        dataset, entry = self._entry(key)
        return bool(dataset.score_answer(text, entry) == 1.0)


def built_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a task as reasoning-gym takes them: the parts of a mixture are objects of its own.

    Raises:
        TypeError: a part with a key that it has not, or without a name.
    """
    if "datasets" not in options:
        return options
    from reasoning_gym.composite import DatasetSpec

    parts = [DatasetSpec(**{"weight": 1.0, "config": {}, **part}) for part in options["datasets"]]
    return {**options, "datasets": parts}


def digest_of(question: str) -> str:
    """By which a question is known again."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def seed_shared_generators(seed: int) -> None:
    """Those of `random` and, where it is loaded, of numpy."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


KINDS: dict[str, Callable[..., Any]] = {"math_verify": MathVerify, "reasoning_gym": ReasoningGym}


def limit_memory() -> None:
    """Cap the address space, where the system can."""
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or hard > MEMORY_LIMIT:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, hard))


def main() -> None:
    """Set up from the first line, then answer line by line until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the trainer, which closes our input
    replies = os.fdopen(os.dup(1), "w")
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)  # whatever a scorer prints must not mix with the replies

    def reply(**message: Any) -> None:
        print(json.dumps(message), file=replies, flush=True)

    setup = json.loads(sys.stdin.readline())
    timeout = setup.pop("timeout")
    try:
        limit_memory()
        checker = KINDS[setup.pop("kind")](**setup)
    except Exception as error:
        reply(error=f"{type(error).__name__}: {error}")
        return
    reply(result=None)

    for line in sys.stdin:
        request = json.loads(line)
        faulthandler.dump_traceback_later(timeout, exit=True, file=devnull)
        try:
            message = {"result": getattr(checker, request["method"])(*request["arguments"])}
        except Exception as error:
            message = {"error": f"{type(error).__name__}: {error}"[:500]}
        faulthandler.cancel_dump_traceback_later()
        reply(**message)


if __name__ == "__main__":
    # this folder's module names must not shadow others
    sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__))]
    main()
