import json
import re
import time
from pathlib import Path

import pytest

from hapo.tasks import exact_reward, extract_answer, math_verify_reward
from hapo.tasks.choices import letters_of
from hapo.tasks.reading import LONGEST, read

from .answer_cases import BOTH, MATHS, REFUSED

SHARED = Path(__file__).parents[3] / "shared/cases/answers.jsonl"
EXACT = {kind: [(*row[:2], 1 if row[2] is None else row[2]) for row in rows] for kind, rows in BOTH.items()}
VERIFIED = {
    kind: [row for row in BOTH.get(kind, []) if row[2] is not None] + MATHS.get(kind, []) for kind in BOTH | MATHS
}


@pytest.fixture(scope="module")
def math_verify():
    return math_verify_reward(timeout=60.0)


def wrong(reward, rows):
    """The rows that the reward scores otherwise."""
    golds, completions, scores = zip(*rows, strict=True)
    given = reward([""] * len(rows), list(completions), answer=list(golds))
    return [(*row, got) for row, score, got in zip(rows, scores, given, strict=True) if got != score]


@pytest.mark.parametrize("kind", EXACT)
def test_exact_finds_what_is_stated(kind):
    assert wrong(exact_reward, EXACT[kind]) == []


@pytest.mark.parametrize("kind", VERIFIED)
def test_math_verify_finds_and_reads_what_is_stated(math_verify, kind):
    assert wrong(math_verify, VERIFIED[kind]) == []


@pytest.mark.skipif(not SHARED.exists(), reason="the shared cases are not beside the project")
def test_shared_cases_have_the_scores_that_they_deserve(math_verify):
    cases = [json.loads(line) for line in SHARED.read_text().splitlines()]
    for name, reward in (("exact", exact_reward), ("math_verify", math_verify)):
        rows = [(c["gold"], c["completion"], c["score"]) for c in cases if c["rewards"] in ("all", name)]
        assert wrong(reward, rows) == []


@pytest.mark.parametrize(("gold", "message"), REFUSED)
def test_golds_that_no_answer_could_match_are_refused_with_a_remedy(math_verify, gold, message):
    assert re.search(message, math_verify.fault(gold) or "no fault")


def test_golds_of_the_table_accept_themselves(math_verify):
    golds = {gold for rows in VERIFIED.values() for gold, *_ in rows} - {"1e999999999"}
    assert {gold: fault for gold in golds if (fault := math_verify.fault(gold))} == {}
    boxed = [(gold, rf"\boxed{{{gold}}}", 1) for gold in sorted(golds)]
    assert wrong(math_verify, boxed) == []


@pytest.mark.parametrize(
    "piece",
    ["<answer>", "</answer><answer>", "\\boxed{", "answer is ", "the answer ", "#", "#### ", "<think>", "**", "\n", "{", " ",
     "1,", "1 ", "A, ", "\\text{", "9", "a "],
)  # fmt: skip
def test_text_without_end_is_searched_in_time(piece):
    started = time.process_time()
    for text in (piece * (100_000 // len(piece)), f"answer: {piece * (100_000 // len(piece))}x"):
        exact_reward([""], [text], answer=["5"])
        read(text), read(text[:LONGEST]), letters_of(text)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is <answer> 7 </answer>, no, <answer>8</answer>", "8"),
        (r"so \boxed{3}, rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("48/2 = <<48/2=24>>24\n#### 72", "72"),
        ("Answer: a grid\n1 2\n3 4\n", "a grid\n1 2\n3 4"),
        ("  Plain text ", "Plain text"),
        (r"cut off \boxed{\frac{1}{2", r"cut off \boxed{\frac{1}{2"),
        (r"<answer>\boxed{5}</answer> #### 6", "5"),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_exact_reward_ignores_case_and_white_space_and_nothing_else():
    completions = [
        "The answer:  New   york",
        "#### NEW YORK",
        "New York.",
        [{"role": "assistant", "content": "new york"}],
    ]
    gold = ["New York"] * 4
    assert exact_reward(prompts=[""] * 4, completions=completions, answer=gold) == [1.0, 1.0, 0.0, 1.0]
