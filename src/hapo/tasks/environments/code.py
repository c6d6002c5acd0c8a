"""Code that trains a classifier on a table: the setting of ETPO's paper (arXiv 2402.06700).

The model writes ``build_model(x_train, y_train)``, which returns a fitted classifier. The reward is its ROC-AUC on
the other half of the table, one class against the rest, the mean of five splits; -1 where the program fails, and
the model then sees the error and tries again. The tables are those that scikit-learn brings.

The programs are hostile until proven otherwise. They run in processes without network, without other processes and
files (`_confine` says how), get no labels but those of the training half, and give back numbers, from which the
reward is computed here: a program can end badly or predict badly, and nothing else.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..process import Worker

if TYPE_CHECKING:
    from datasets import Dataset

LOG = logging.getLogger(__name__)

TABLES = ("breast_cancer", "digits", "iris", "wine")

FAILED = -1.0
"""Reward of a program that fails."""

SPLITS = 5

TOLD = 1000
"""Characters of a failed program's output that the model sees, the last ones."""

OUTPUT = 1 << 20
"""Bytes that a program may print, and give back."""

REMEDY = (
    "Train on Linux 5.13 or later with Landlock (/sys/kernel/security/lsm names it), on x86-64 or ARM64. Or train "
    "in a container of its own, with no secret in it, and say so with isolation='container': a program can then "
    "read the files of the container, the labels of the tables among them; all else is refused to it as before"
)

ONE = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LOKY_MAX_CPU_COUNT")
"""Variables that say how many threads and processes libraries begin."""

FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)

ADDRESS = re.compile(r"\b0x[0-9a-f]{8,}\b")
"""Of an object in memory, as error messages have it: another one in each worker."""


class CodeEnvironment:
    """A table in at most `max_turns` programs; the episode ends with the first that does not fail.

    The reward of a turn is the mean ROC-AUC of five splits in halves, in [0, 1], or -1. It is a function of table
    and program: random numbers have a seed, in numpy and in `random`. A program that uses up its time is none,
    and on another machine it may not.

    Args:
        max_turns: programs of an episode.
        seconds: of one core, for each split; by the clock six times as long.
        memory: address space of a program, bytes; the libraries take half a GiB of it.
        isolation: "kernel": the process of a program gives up what it does not need. "container": as well, but it
            can read files: you declare that the trainer runs in a container that has nothing to hide.

    Raises:
        ValueError: a limit that no program could keep, or an unknown isolation.
        RuntimeError: programs cannot be confined on this machine, or scikit-learn is not installed.
    """

    def __init__(
        self,
        max_turns: int = 5,
        *,
        seconds: int = 10,
        memory: int = 2 << 30,
        isolation: Literal["kernel", "container"] = "kernel",
    ) -> None:
        for name, value, least in (
            ("max_turns", max_turns, 1),
            ("seconds", seconds, 1),
            ("memory", memory, 1 << 30),
        ):
            if not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if isolation not in ("kernel", "container"):
            raise ValueError(f"isolation must be 'kernel' or 'container', got {isolation!r}")
        self.max_turns = max_turns
        self.reward, self.done = 0.0, True
        self._runner = _runner(seconds, memory, isolation)
        self._splits: Sequence[Split] = ()
        self._turns = 0

    def reset(self, **row: Any) -> str | None:
        """Begin with the `table` of a row; its prompt says it all.

        Raises:
            ValueError: there is no such table.
        """
        self._splits, self._turns = _splits(row["table"]), 0
        self.reward, self.done = 0.0, False
        return None

    def run(self, code: str) -> str:
        """Run a program that trains a classifier, and score it.

        Args:
            code: Python code that defines build_model(x_train, y_train), alone or in a fenced block.

        Returns:
            The ROC-AUC of the classifier, or the error that the program ended with.
        """
        if self.done:
            raise RuntimeError("the episode is over: call reset before another program")
        self._turns += 1
        try:
            aucs = [self._runner.auc(program(code), split) for split in self._splits]
        except ProgramError as error:
            self.reward, self.done = FAILED, self._turns >= self.max_turns
            return f"An error was reported while executing the program:\n{error}\nPlease fix it."
        self.reward, self.done = float(np.mean(aucs)), True
        return f"ROC-AUC {self.reward:.4f}"

    def get_reward(self) -> float:
        """The reward of the last turn, which is that of the episode; where there was none, that of a failure."""
        return self.reward if self._turns else FAILED


class ProgramError(Exception):
    """A program failed; the message is what its author is told."""


@dataclass(frozen=True)
class Split:
    """Two halves of a table."""

    file: Path
    """What a program gets: x_train, y_train and x_test."""
    labels: np.ndarray
    """Of the rows of x_test, 0 to K - 1."""
    classes: int


class _Runner:
    """Runs programs, one at a time, in the processes of one worker."""

    def __init__(self, seconds: int, memory: int, isolation: str) -> None:
        if sys.platform != "linux":
            raise RuntimeError(f"code environment: programs cannot be confined on {sys.platform}. {REMEDY}")
        from ._confine import lacking

        landlock = isolation == "kernel"
        if (reason := lacking(landlock=landlock)) is not None:
            raise RuntimeError(f"code environment: programs cannot be confined here: {reason}. {REMEDY}")
        self.seconds = seconds
        kept = ("PATH", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH")  # and no tokens or keys
        self.worker = Worker(
            "the code environment",
            Path(__file__).with_name("_code_worker.py"),
            {"seconds": seconds, "memory": memory, "output": OUTPUT, "landlock": landlock},
            {name: os.environ[name] for name in kept if name in os.environ}
            | dict.fromkeys(ONE, "1")
            | {"PYTHONHASHSEED": "0"},
        )

    def auc(self, code: str, split: Split) -> float:
        """One class against the rest, the mean over the classes; the second column's of two classes."""
        answer = self.worker.answer({"code": code, "data": str(split.file)})
        if answer is None:
            LOG.warning("the worker of the code environment was ended (too little memory?): another takes over")
            raise ProgramError("the program was ended: the machine has too little memory")
        result = answer["result"]
        if result["exit"] != 0:
            raise ProgramError(self._fault(result["exit"], result["text"]))
        given = bytes.fromhex(result["scores"])
        rows = len(split.labels)
        if len(given) != 8 * rows * split.classes:
            raise ProgramError(
                f"predict_proba gave {len(given) // 8} numbers for {rows} rows of {split.classes} classes"
            )
        scores = np.frombuffer(given, "<f8").reshape(rows, split.classes)
        if not np.isfinite(scores).all():
            raise ProgramError("predict_proba gave numbers that are not finite")
        from sklearn.metrics import roc_auc_score

        columns = range(split.classes) if split.classes > 2 else [1]
        return float(np.mean([roc_auc_score(split.labels == k, scores[:, k]) for k in columns]))

    def _fault(self, status: int, text: str) -> str:
        text = ADDRESS.sub("0x...", text)  # a resumed run must be told the same
        ends = {-9: f"the program was ended: it took more than {self.seconds} s, or too much memory"}
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        end = "" if status == 1 and text.strip() else ends.get(status, f"the program ended {how}")
        return f"{text.strip()}\n{end}".strip()[-TOLD:]


@functools.lru_cache(maxsize=8)
def _runner(seconds: int, memory: int, isolation: str) -> _Runner:
    return _Runner(seconds, memory, isolation)


@functools.cache
def _folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="hapo-code-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def _splits(table: str) -> tuple[Split, ...]:
    """Halves of a table, shuffled, with every class in the same share in both."""
    from sklearn.model_selection import train_test_split

    data = _load(table)
    splits = []
    for seed in range(SPLITS):
        x_train, x_test, y_train, y_test = train_test_split(
            data.data, data.target, test_size=0.5, random_state=seed, shuffle=True, stratify=data.target
        )
        file = _folder() / f"{table}-{seed}.npz"
        np.savez(file, x_train=x_train, y_train=y_train, x_test=x_test)
        splits.append(Split(file, y_test, len(data.target_names)))
    return tuple(splits)


@functools.cache
def _load(table: str) -> Any:
    if table not in TABLES:
        raise ValueError(f"there is no table {table!r}: choose from {', '.join(TABLES)}")
    try:
        from sklearn import datasets
    except ImportError as error:
        raise RuntimeError(
            f"the code environment needs scikit-learn ({error}): pip install 'hapo[agents]'"
        ) from error
    return getattr(datasets, f"load_{table}")()


def program(text: str) -> str:
    """The code of a turn: its last fenced block, or all of it."""
    return blocks[-1] if (blocks := FENCED.findall(text)) else text


def prompt(table: str) -> str:
    """What the model is asked for."""
    data = _load(table)
    rows, columns = data.data.shape
    names = ", ".join(map(str, data.feature_names)) if columns <= 32 else "pixels"
    return (
        f"Classification of the table {table.replace('_', ' ')}: {rows} rows, {columns} columns ({names}), "
        f"{len(data.target_names)} classes.\n"
        "Write Python code that defines build_model(x_train, y_train): it returns a scikit-learn classifier with "
        f"predict_proba, trained with x_train, a numpy array of {columns} columns, and y_train, whole numbers. "
        "The higher its ROC-AUC on other rows, the better. The code runs alone: one thread (leave n_jobs out), no "
        "files, no network. Answer with the code.\n"
    )


def load(seed: int, train_size: int, eval_size: int) -> tuple[type[CodeEnvironment], Dataset, Dataset]:
    """The environment with rows to train on and rows to measure: the tables in turn, from one that `seed` says.

    Columns: prompt (messages, for the chat template of a model), question (the table's name), answer (none) and
    table. Both have the same tables, of which there are four: what is measured is the policy on these.
    """
    return CodeEnvironment, _rows(train_size, seed, chat=True), _rows(eval_size, 0, chat=True)


def load_text(seed: int, train_size: int, eval_size: int) -> tuple[type[CodeEnvironment], Dataset, Dataset]:
    """The same with prompts that are plain text, for models without a chat template."""
    return CodeEnvironment, _rows(train_size, seed, chat=False), _rows(eval_size, 0, chat=False)


def _rows(size: int, first: int, *, chat: bool) -> Dataset:
    from datasets import Dataset

    tables = [TABLES[(first + i) % len(TABLES)] for i in range(size)]
    prompts = [[{"role": "user", "content": prompt(t)}] if chat else prompt(t) for t in tables]
    return Dataset.from_dict({"prompt": prompts, "question": tables, "answer": [""] * size, "table": tables})
