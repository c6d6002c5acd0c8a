"""Semantic entropy: worked example, its bounds and invariances, clusters that do not depend on order, stages."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hapo.tasks import math_verify_reward
from hapo.tasks.addition import addition_reward
from hapo.tasks.final_answers import ExactAnswers, MathAnswers, Sums, answer_space
from hapo.tasks.rewards import exact_reward
from hapo.tasks.semantic import answer_clusters, semantic_entropy, stages

LOGPS, CLUSTERS = [-12.0, -12.5, -13.0, -14.0], [0, 0, 1, 2]


@pytest.fixture(scope="module")
def maths():
    return MathAnswers(math_verify_reward(5.0))


def test_the_worked_example():
    assert semantic_entropy(LOGPS, CLUSTERS) == pytest.approx(0.688234, abs=1e-6)
    assert semantic_entropy(LOGPS, CLUSTERS, by="count") == pytest.approx(1.039721, abs=1e-6)


@given(
    samples=st.lists(st.tuples(st.floats(-2e4, 0.0), st.integers(0, 4)), min_size=1, max_size=12),
    shift=st.floats(-1e3, 1e3),
    seed=st.integers(0, 99),
    by=st.sampled_from(["likelihood", "count"]),
)
def test_bounds_and_invariances(samples, shift, seed, by):
    logps, clusters = (list(column) for column in zip(*samples, strict=True))
    found = semantic_entropy(logps, clusters, by)
    assert 0 <= found <= math.log(len(set(clusters)))
    assert semantic_entropy([logp + shift for logp in logps], clusters, by) == pytest.approx(found, abs=1e-9)
    names = random.Random(seed).sample(range(-50, 50), 5)
    assert semantic_entropy(logps, [names[c] for c in clusters], by) == found
    order = random.Random(seed).sample(range(len(samples)), len(samples))
    assert semantic_entropy([logps[i] for i in order], [clusters[i] for i in order], by) == found


def test_one_cluster_has_none_and_equal_clusters_have_all():
    assert semantic_entropy([-3.0, -700.0], [5, 5]) == 0.0
    assert semantic_entropy([-1e5] * 6, [0, 1, 2, 0, 1, 2]) == pytest.approx(math.log(3), abs=1e-15)
    assert semantic_entropy([-1e5, -math.inf], [0, 1]) == 0.0  # a cluster of probability 0


@pytest.mark.parametrize("logps", [[math.nan, -1.0], [math.inf, -1.0], [-math.inf] * 2, [-1.0]])
def test_what_has_no_entropy(logps):
    with pytest.raises(ValueError, match="log-probabilities"):
        semantic_entropy(logps, [0, 1])


def test_a_chain_is_one_cluster_whatever_the_order_and_direction():
    """b is right where a is, c where b is; nothing else."""
    links = {("a", "b"), ("b", "c")}

    def same(one: str, other: str) -> bool:
        return (one, other) in links

    assert answer_clusters(["c", "d", "a"], same) == [0, 1, 2]  # no chain without b
    assert answer_clusters(["c", "d", "a", "b", None, "d", None], same) == [0, 1, 0, 0, 2, 1, 3]


MIXED = [
    r"\boxed{50\%}", "The answer is 50.", "So #### 0.5", r"it is $\frac{1}{2}$", "Answer: 1/2", "answer: fifty",
    "The answer is 3 minutes.", "The answer is 3 hours.", "#### 3", r"\boxed{x+1}", r"\boxed{1+x}", "I do not know",
    r"\boxed{(1,2)}", r"\boxed{[1,2]}", r"\boxed{1,2}", "", "#### Fifty", "we get 5 + 3 = 8 apples",
    "so 8 it is", "#### 8.0", r"\boxed{x>5}", r"\boxed{(5,\infty)}",
]  # fmt: skip


def partition(clusters: list[int], order: list[int]) -> set[frozenset[int]]:
    return {frozenset(order[i] for i, c in enumerate(clusters) if c == k) for k in clusters}


def test_clusters_of_a_hundred_shuffles_are_equal(maths):
    """Of answers that math-verify finds the same in one direction only, or by way of a third."""
    answers = [maths.canonical(text) for text in MIXED]
    asked: dict[tuple[str, str], bool] = {}

    def same(one: str, other: str) -> bool:
        if (one, other) not in asked:
            asked[one, other] = maths.same(one, other)
        return asked[one, other]

    found = partition(answer_clusters(answers, same), list(range(len(MIXED))))
    for seed in range(100):
        order = random.Random(seed).sample(range(len(MIXED)), len(MIXED))
        assert partition(answer_clusters([answers[i] for i in order], same), order) == found
    equal = [{0, 1, 2, 3, 4}, {5, 16}, {6, 7, 8}, {9, 10}, {11}, {15}, {17, 18, 19}, {20, 21}]
    assert all(frozenset(one) in found for one in equal)
    # not transitive: 3 is 3 minutes and 3 hours, which are not the same; 50 % is 50 and 0.5
    assert same("3", "3 minutes") and not same("3 minutes", "3 hours") and not same("50", "0.5")
    assert same("x>5", r"(5,\infty)") and not same(r"(5,\infty)", "x>5")  # not symmetric


def test_canonical_forms(maths):
    forms = {"#### 5.0": "5", "The answer is 1,234.": "1234", r"\boxed{0.50}": "0.5", "answer: Fifty": "fifty"}
    for text, form in forms.items():
        assert maths.canonical(text) == form
    assert maths.canonical("<think>7</think>") is None
    assert ExactAnswers().canonical("The answer is 5.0") == "5" and ExactAnswers().canonical(" ") is None
    assert [Sums().canonical(text) for text in ("1+2=3;3", "7", "3;", "12;x")] == ["3", "7", None, None]


def test_the_space_is_that_of_the_reward():
    maths = math_verify_reward(1.0)
    kinds = [
        ("auto", [maths], MathAnswers),
        ("auto", [addition_reward], Sums),
        ("auto", [exact_reward], ExactAnswers),
    ]
    kinds += [("exact", [maths], ExactAnswers), ("math_verify", [exact_reward], MathAnswers)]
    for equality, rewards, kind in kinds:
        assert type(answer_space(equality, rewards, 1.0)) is kind


def test_stages():
    entropies = [0.9, 0.0, 0.4, 0.9, 0.1]
    assert stages(entropies, 2) == [[1, 4, 2], [0, 3]]
    assert stages(entropies, 1) == [[1, 4, 2, 0, 3]]
    assert stages(entropies, 5) == [[1], [4], [2], [0], [3]]
    assert [len(stage) for stage in stages([0.0] * 11, 4)] == [3, 3, 3, 2]
    for count in (0, 6):
        with pytest.raises(ValueError, match=f"5 prompts cannot make {count} stages"):
            stages(entropies, count)
    with pytest.raises(ValueError, match="NaN"):
        stages([0.0, math.nan], 1)
