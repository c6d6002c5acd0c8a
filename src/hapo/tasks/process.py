"""A process that answers: a script of its own, one JSON object a line in and out."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Worker:
    """Handle of such a process, started at the first question and again where it has ended.

    It runs as a plain script, so that no guard around `__main__` is needed in a user's training script. It ends
    with `close`, with this object, or with the interpreter.

    Args:
        name: what it is called in messages.
        script: a file; its first line of input is `setup`, which it answers by ``{"result": ...}``, or by
            ``{"error": str}`` where it cannot work.
        environment: the variables of the process, all of them.
    """

    def __init__(self, name: str, script: Path, setup: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self.name = name
        self._script, self._setup, self._environment = script, dict(setup), dict(environment)
        self._process: subprocess.Popen[str] | None = None
        self._end: Callable[[], object] = lambda: None

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any] | None:
        """What it answers; None where it ended before it did.

        Raises:
            RuntimeError: the process cannot be started.
        """
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = self._start()
        answer = _exchange(self._process, question)
        if answer is None:
            self.close()
        return answer

    def close(self) -> None:
        """End the process, if there is one; a later question starts another."""
        self._end()
        self._process = None

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(self._script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self._environment,
            text=True,
            encoding="utf-8",
        )
        self._end = weakref.finalize(self, _end_process, process)
        message = _exchange(process, self._setup)
        if message is None or "error" in message:
            self.close()
            reason = message["error"] if message else "it ended at once"
            raise RuntimeError(f"{self.name} cannot start: {reason}")
        return process


def _exchange(process: subprocess.Popen[str], message: Mapping[str, Any]) -> dict[str, Any] | None:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        print(json.dumps(message), file=process.stdin, flush=True)
    except BrokenPipeError:
        return None
    line = process.stdout.readline()
    return json.loads(line) if line.endswith("\n") else None


def _end_process(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # a question that nobody read
            pipe.close()
