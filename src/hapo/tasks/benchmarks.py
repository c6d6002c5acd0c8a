"""Named sets of problems, which are what their name says or are refused."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from .columns import columns_of
from .config import REASONING_GYM, TaskConfig
from .data import EVAL_SEED, load_task, sample_rows
from .files import SUFFIXES, Row, is_local, read_file, read_hub, read_local, set_name
from .reading import gold_text
from .rewards import RewardFunction, math_verify_reward
from .stated import last_box
from .table import dataset_of

if TYPE_CHECKING:
    from datasets import Dataset

NUMBER = re.compile(r"[-+]?(\d+|\d{1,3}(,\d{3})+)(\.\d*)?")


@dataclass(frozen=True)
class HubSource:
    """Where a set lies on the Hugging Face Hub."""

    dataset: str
    config: str | None
    split: str
    question: str
    answer: str


@dataclass(frozen=True)
class Benchmark:
    """A named set: how many problems it has, and what they say."""

    title: str
    rows: int
    sha256: str | None
    """`content_hash` of its rows; None where no copy was at hand, so that only the rows can be counted."""
    hub: HubSource | None
    """None where no set of the Hub is known to have these problems in two columns."""


BENCHMARKS = {
    "aime24": Benchmark(
        "AIME 2024",
        30,
        "e4822531dbb9d0a6328ee105e43697dc5009fc3aeb4a227165b877b70947d9be",
        HubSource("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    ),
    "aime25": Benchmark(
        "AIME 2025",
        30,
        "6d545a315796ce9370f00c78c33c3e1fc4e207a6d71befd2810f7f2cc8771609",
        HubSource("math-ai/aime25", None, "test", "problem", "answer"),
    ),
    "amc": Benchmark(
        "AMC 12 of 2022 and 2023",
        83,
        None,
        HubSource("AI-MO/aimo-validation-amc", None, "train", "problem", "answer"),
    ),
    "amc23": Benchmark(
        "AMC 12 of 2023",
        40,
        "c5842baa4ae8e95172dd840a50c5d5fcda7d01873515fc155a1b26860add34e0",
        HubSource("math-ai/amc23", None, "test", "question", "answer"),
    ),
    "math500": Benchmark(
        "MATH500",
        500,
        "7d9cb507f485785f86f0eec4ee4745bb7c3fda2049de9ac158c23dbb3fbe90f1",
        HubSource("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    ),
    "minerva_math": Benchmark(
        "Minerva Math",
        272,
        "a6882844d805122c14ae89dadfba4cc51f8b3e2c66d64f19607b51d7f5511994",
        HubSource("math-ai/minervamath", None, "test", "question", "answer"),
    ),
    "olympiadbench": Benchmark(
        "OlympiadBench, open-ended English mathematics without images",
        675,
        "dc01f259a7b8d6afe01da4a1eafe16b1897d48c1007490696b40f1dcaf1a9cd5",
        None,
    ),
    "gsm8k": Benchmark(
        "GSM8K, test part",
        1319,
        "84946c8c2db4a94dd1c87ac93543b0123f9c96fc7279840adeec0b8747d22c85",
        HubSource("openai/gsm8k", "main", "test", "question", "answer"),
    ),
    "svamp": Benchmark(
        "SVAMP",
        1000,
        "e5d9b7bab38dff2778b06267e72bf501a12741ce847f4d1006889d8f8764a355",
        None,
    ),
    "mawps": Benchmark(
        "MAWPS",
        2065,
        "831478048a9ae6d386a0c4584a143b47c88bf9dc6a194ed423f8e9aa1a5087d2",
        None,
    ),
}
"""The sets of the paper are aime24, aime25, amc, math500, olympiadbench and minerva_math."""


@dataclass(frozen=True)
class ProblemSet:
    """Problems to measure on, and the reward that says which answers are right."""

    name: str
    problems: Dataset
    """Columns prompt, question and answer."""
    of: int
    """Problems of the whole set, of which `problems` may be a sample."""
    reward: RewardFunction
    source: str
    sha256: str
    """`content_hash` of the whole set."""
    verified: bool
    """The whole set is known to have this hash."""
    unreadable: int
    """Problems whose gold answer the reward cannot read, so that no answer to them is right."""


def load_benchmark(name: str, config: TaskConfig, *, folder: Path | None, size: int | None) -> ProblemSet:
    """The problems of a named set, of a generated task (addition, reasoning_gym:NAME), or of a file.

    `config` says how a problem is put to the model (chat, system_prompt, prompt_template), which columns a file
    has, and the time that scoring may take. Of a folder of one's own with files by split the test files are read.
    A named set is read from `folder`/NAME.jsonl (columns question and
    answer) if a folder is given, otherwise from the Hub; scored by math-verify, as is a file. `size` problems
    are taken, the same ones at every call; None takes all, of a generated task 500.

    Raises ValueError for an unknown name, and for a named set with another number of rows or other content;
    FileNotFoundError for a file that does not exist.
    """
    if name == "addition" or name.startswith(REASONING_GYM):
        return _generated(name, config, size)
    if name not in BENCHMARKS and is_local(name):
        known, source = None, name
        rows = _with_text_answers(columns_of(read_local(name, None), config), source)
    else:
        known = find_benchmark(name)
        rows, source = _named(name, known, config, folder)
        check_content(name, rows, source)
    reward = math_verify_reward(config.reward_timeout)
    return ProblemSet(
        name=set_name(name),
        problems=dataset_of(sample_rows(rows, size, EVAL_SEED, "problems")),
        of=len(rows),
        reward=reward,
        source=source,
        sha256=content_hash(rows),
        verified=known is not None and known.sha256 is not None,
        unreadable=sum(reward.fault(row["answer"]) is not None for row in rows),
    )


def find_benchmark(name: str) -> Benchmark:
    """The named set; ValueError for a name that none has."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    close = difflib.get_close_matches(name, BENCHMARKS, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ValueError(
        f"unknown benchmark {name!r}{hint}; choose from {', '.join(BENCHMARKS)}, addition, {REASONING_GYM}NAME, "
        f"or name a folder, or a file that ends in {', '.join(SUFFIXES)}"
    )


def check_content(name: str, rows: list[Row], source: str) -> None:
    """Raise ValueError unless the rows are those of the named set; say which set they are, if it is known."""
    known, found = BENCHMARKS[name], content_hash(rows)
    if len(rows) == known.rows and known.sha256 in (None, found):
        return
    remedy = "A set of your own goes by the name of its file: --benchmarks FILE.jsonl"
    for other, benchmark in BENCHMARKS.items():
        if benchmark.sha256 == found:
            raise ValueError(
                f"{source}: this is {other} ({benchmark.title}, {benchmark.rows} problems), not {name} "
                f"({known.title}, {known.rows} problems). Ask for --benchmarks {other}"
            )
    if len(rows) == known.rows:
        raise ValueError(
            f"{source}: {name} ({known.title}) has other questions or answers than these {len(rows)}: their hash "
            f"is {found}, not {known.sha256}. {remedy}"
        )
    alike = [f"{n} ({b.title})" for n, b in BENCHMARKS.items() if b.rows == len(rows)]
    hint = f", as many as {' or '.join(alike)} has" if alike else ""
    raise ValueError(
        f"{source}: {name} ({known.title}) has {known.rows} problems, but these are {len(rows)}{hint}. {remedy}"
    )


def content_hash(rows: list[Row]) -> str:
    """SHA-256 of questions and answers, in any order.

    White space does not count. Of an answer only what stands in a box or behind ``####`` counts, and a number
    only by its value: 70,000 is 70000 and 27.0 is 27.
    """
    lines = sorted(json.dumps([_squeeze(row["question"]), _canonical(row["answer"])]) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _canonical(answer: str | int | float) -> str:
    # not `extract_answer`, whose answers get simpler with time: a hash that is known must stay
    final = str(answer).rpartition("####")[2]
    text = _squeeze(last_box(final) or final)
    return format(Decimal(text.replace(",", "")).normalize(), "f") if NUMBER.fullmatch(text) else text


def _named(name: str, known: Benchmark, config: TaskConfig, folder: Path | None) -> tuple[list[Row], str]:
    """Rows of a named set, and where they came from."""
    config = replace(config, question_column="question", answer_column="answer", extra_columns=[])
    if folder is not None:
        path = folder / f"{name}.jsonl"
        if not path.is_file():
            raise FileNotFoundError(
                f"benchmark {name}: {path} does not exist; put the set there, one object with question and answer "
                f"a line{'' if known.hub is None else f', or read {known.hub.dataset} without benchmark_folder'}"
            )
        return _with_text_answers(columns_of({str(path): read_file(str(path))}, config), str(path)), path.name
    if known.hub is None:
        raise ValueError(
            f"benchmark {name}: no set of the Hub is known to have it as question and answer; put {name}.jsonl "
            "into a folder and give --benchmark_folder"
        )
    hub = known.hub
    config = replace(config, question_column=hub.question, answer_column=hub.answer)
    source = f"{hub.dataset}, split {hub.split}"
    rows = columns_of({source: read_hub(hub.dataset, hub.config, hub.split)}, config)
    return _with_text_answers(rows, source), source


def _with_text_answers(rows: list[Row], source: str) -> list[Row]:
    texts = []
    for number, row in enumerate(rows, 1):
        try:
            texts.append(gold_text(row["answer"]))
        except ValueError as error:
            raise ValueError(
                f"{source}, row {number}: the answer must be text or a number, not {row['answer']!r}"
            ) from error
    return [row | {"answer": text} for row, text in zip(rows, texts, strict=True)]


def _generated(name: str, config: TaskConfig, size: int | None) -> ProblemSet:
    task = load_task(
        TaskConfig(
            dataset=name,
            task_options=config.task_options if name == config.dataset else None,
            chat=config.chat,
            system_prompt=config.system_prompt,
            prompt_template=config.prompt_template,
            reward_timeout=config.reward_timeout,
            train_size=1,
            eval_size=size,
        ),
        seed=EVAL_SEED,
    )
    return ProblemSet(
        name=name,
        problems=task.eval,
        of=len(task.eval),
        reward=task.reward_funcs[0],
        source="generated",
        sha256=content_hash(task.eval.to_list()),
        verified=False,
        unreadable=0,
    )
