"""Answers are judged here, with verl's antlr 4.9, as they are with 4.13: one table holds for both."""

from importlib.metadata import version

import pytest

from hapo.tasks import exact_reward, math_verify_reward
from tests.tasks.answer_cases import BOTH, MATHS, REFUSED


@pytest.fixture(scope="module")
def math_verify():
    return math_verify_reward(timeout=60.0)


def test_this_is_the_other_version_of_the_parser():
    assert version("antlr4-python3-runtime").startswith("4.9")


def test_answers_have_the_same_scores(math_verify):
    rows = [row for table in (BOTH, MATHS) for kind in table.values() for row in kind if row[2] is not None]
    golds, completions, scores = zip(*rows, strict=True)
    given = math_verify([""] * len(rows), list(completions), answer=list(golds))
    assert [(*row, got) for row, score, got in zip(rows, scores, given, strict=True) if got != score] == []
    assert exact_reward([""], ["**Answer:** 5."], answer=["5.0"]) == [1.0]


def test_the_same_golds_are_sound(math_verify):
    golds = {row[0] for table in (BOTH, MATHS) for kind in table.values() for row in kind} - {"1e999999999"}
    faults = {gold: math_verify.fault(gold) for gold in golds}
    assert {gold for gold, fault in faults.items() if fault} == {"New York"}  # for the reward exact
    assert all(math_verify.fault(gold) for gold, _ in REFUSED)
