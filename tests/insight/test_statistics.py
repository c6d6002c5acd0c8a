import itertools
import math
import statistics

import numpy as np
import pandas as pd
import pytest

from hapo.insight.statistics import (
    MIN_SEEDS,
    Difference,
    area_under_curve,
    compare_arms,
    first_reaching,
    holm,
    mean_interval,
    paired_difference,
    paired_problems,
    pass_at_k,
    restrict,
    verdict,
)

SHAPES = {
    "normal": lambda rng, size: rng.normal(size=size),
    "heavy tails": lambda rng, size: rng.laplace(size=size),
    "skewed": lambda rng, size: rng.gamma(4, size=size) - 4,
    "accuracy": lambda rng, size: np.round(500 * rng.normal(0, 0.015, size)) / 500,
}


@pytest.mark.parametrize("n", [8, 12])
@pytest.mark.parametrize("shape", SHAPES)
def test_intervals_cover_95_percent_of_2000_simulations(shape: str, n: int) -> None:
    differences = SHAPES[shape](np.random.default_rng(n), (2_000, n))
    covered = [
        found.low <= 0 <= found.high
        for seed, row in enumerate(differences)
        for found in [paired_difference(row, np.zeros(n), resamples=399, seed=seed)]
    ]
    assert 0.93 <= np.mean(covered) <= 0.97


def test_five_equal_arms_have_a_false_winner_in_at_most_5_percent_of_2000_comparisons() -> None:
    rng, n = np.random.default_rng(0), 8
    named = 0
    for seed in range(2_000):
        scores = rng.normal(size=(n, 1)) + rng.normal(size=(n, 5))
        table = pd.DataFrame(scores, columns=list("rabcd"))
        named += bool((compare_arms(table, "r", seed=seed, resamples=799)["p_holm"] <= 0.05).any())
    assert 0 < named / 2_000 <= 0.05


def test_the_interval_is_the_documented_bootstrap_t() -> None:
    d, n, rng = [0.3, 1.1, -0.2, 0.9, 0.4], 5, np.random.default_rng(0)
    mean, deviation = statistics.mean(d), statistics.stdev(d)
    picks, noise = rng.integers(n, size=(999, n)).tolist(), rng.standard_normal((999, n)).tolist()
    t = []
    for row, e in zip(picks, noise, strict=True):
        resample = [d[i] + deviation / n * e_j for i, e_j in zip(row, e, strict=True)]
        t.append((statistics.mean(resample) - mean) * math.sqrt(n) / statistics.stdev(resample))
    error, t = deviation / math.sqrt(n), sorted(map(abs, t))
    found = paired_difference(d, [0.0] * n, resamples=999)
    # Of 999 ordered values the 95 % quantile is the 950th.
    assert [found.low, found.high] == pytest.approx([mean - t[949] * error, mean + t[949] * error])
    assert found.p == pytest.approx((sum(v >= mean / error for v in t) + 1) / 1_000)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_p_is_small_exactly_where_the_interval_leaves_out_zero(confidence: float) -> None:
    rng = np.random.default_rng(1)
    shown = 0
    for sign in (-1, 1) * 150:
        found = paired_difference(sign * rng.normal(0.8, 1, 8), np.zeros(8), confidence=confidence, resamples=999)
        out = not found.low <= 0 <= found.high
        assert (found.p <= 1 - confidence + 1e-12) == out
        shown += out
    assert 0 < shown < 300


def test_the_interval_just_touches_zero_at_its_own_p() -> None:
    a, zero = np.array([0.3, 1.1, -0.2, 0.9, 0.4, 0.1, 0.8, -0.1]), np.zeros(8)
    p = paired_difference(a, zero).p
    assert 0.001 < p < 0.1
    assert paired_difference(a, zero, confidence=1 - p - 2e-4).low > 0
    assert paired_difference(a, zero, confidence=1 - p + 2e-4).low < 0


def test_large_samples_give_the_normal_interval() -> None:
    values = np.random.default_rng(2).normal(3, 2, 1_000)
    found, half = mean_interval(values), 1.96 * values.std(ddof=1) / math.sqrt(1_000)
    assert found.mean == pytest.approx(values.mean())
    assert [found.low, found.high] == pytest.approx([found.mean - half, found.mean + half], abs=0.05 * half)
    assert found.half_width == pytest.approx(half, rel=0.05)


def test_differences_do_not_depend_on_unit_offset_or_second_call() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 10))
    one = paired_difference(a, b)
    assert one == paired_difference(a, b) == paired_problems(a, b)
    assert one != paired_difference(a, b, seed=1)
    other = paired_difference(100 * a + 7, 100 * b + 7)
    assert [other.low, other.high] == pytest.approx([100 * one.low, 100 * one.high])
    assert other.p == one.p and one.n == 10 and one.mean == pytest.approx((a - b).mean())


def test_swapping_the_arms_mirrors_the_interval_up_to_resampling() -> None:
    a, b = np.random.default_rng(4).normal(size=(2, 12))
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert [-other.high, -other.low] == pytest.approx([one.low, one.high], abs=0.05 * one.half_width)
    assert other.p == pytest.approx(one.p, abs=0.01)


def test_equal_differences_are_a_point() -> None:
    a = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    same = paired_difference(a, a)
    assert same == Difference(mean=0.0, low=0.0, high=0.0, n=5, p=1.0)
    # 0.3 - 0.1 and 0.9 - 0.7 differ in their last digits.
    shifted = paired_difference(a + 0.2, a, resamples=999)
    assert shifted.low == shifted.high == pytest.approx(0.2) and shifted.p == 0.001
    assert paired_difference(0.1 + a + 0.2, a + 0.3).p == 1


def test_ties_leave_the_interval_finite() -> None:
    found = paired_difference(np.array([0.002] + [0.0] * 7), np.zeros(8))
    assert -1 < found.low < 0 < found.high < 1 and found.p > 0.05


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros(MIN_SEEDS - 1), np.zeros(MIN_SEEDS - 1), f"at least {MIN_SEEDS} values, got {MIN_SEEDS - 1}"),
        (np.zeros(6), np.zeros(7), "a has 6 values and b 7"),
        (np.full(6, np.nan), np.zeros(6), "a must be one-dimensional and finite"),
        (np.zeros(6), np.zeros((2, 3)), "b must be one-dimensional and finite"),
    ],
)
def test_pairs_that_give_no_interval_are_refused(a: np.ndarray, b: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(a, b)


@pytest.mark.parametrize(("confidence", "resamples"), [(1.0, 999), (0.0, 999), (0.9995, 999), (1.5, 999)])
def test_a_confidence_out_of_reach_is_refused(confidence: float, resamples: int) -> None:
    with pytest.raises(ValueError, match="no interval at confidence"):
        mean_interval(np.arange(8), confidence=confidence, resamples=resamples)


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.04: 4 x 0.01, 3 x 0.02, then the running maximum of 0.06 and 2 x 0.03, 0.04.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and len(holm([])) == 0
    with pytest.raises(ValueError, match=r"\[0, 1\], got \[nan"):
        holm([math.nan, 0.1])


def difference(mean: float, low: float, high: float) -> Difference:
    return Difference(mean=mean, low=low, high=high, n=12, p=0.001)


@pytest.mark.parametrize(
    ("found", "p", "better", "text"),
    [
        ((0.023, 0.01, 0.036), 0.004, "higher", "A better than B by 2.3 points [1.0, 3.6]"),
        ((-0.023, -0.036, -0.01), 0.004, "higher", "A worse than B by 2.3 points [1.0, 3.6]"),
        ((-0.023, -0.036, -0.01), 0.004, "lower", "A better than B by 2.3 points [1.0, 3.6]"),
        ((0.023, 0.01, 0.036), 0.004, "lower", "A worse than B by 2.3 points [1.0, 3.6]"),
        ((0.023, 0.01, 0.036), 0.004, "neither", "A higher than B by 2.3 points [1.0, 3.6]"),
        ((-0.023, -0.036, -0.01), 0.05, "neither", "A lower than B by 2.3 points [1.0, 3.6]"),
        ((-0.002, -0.017, 0.013), 0.8, "higher", "no difference shown: -0.2 points [-1.7, 1.3]"),
        ((0.023, 0.01, 0.036), 0.051, "higher", "no difference shown: 2.3 points [1.0, 3.6]"),
    ],
)
def test_verdicts(found: tuple[float, float, float], p: float, better: str, text: str) -> None:
    said = verdict(difference(*found), p, "A", "B", comparisons=4, better=better)  # type: ignore[arg-type]
    assert said.startswith(f"{text} (p {p:.2g} after Holm over 4 comparisons, 12 pairs)")
    precision = "differences below about 1." in said
    assert precision == ("no difference" in text)


def test_verdicts_speak_in_the_measure_s_unit() -> None:
    said = verdict(
        difference(-12_345.0, -23_456.0, -1_234.0), 0.01, "A", "B", better="lower", unit="tokens", scale=1.0
    )
    assert said == "A better than B by 12,345 tokens [1,234, 23,456] (p 0.01, 12 pairs)"
    assert verdict(difference(0.0, 0.0, 0.0), 1.0, "A", "B") == "no difference: A equals B in all 12 pairs"
    said = verdict(difference(-0.00001, -0.02, 0.02), 0.9, "A", "B")
    assert said.startswith("no difference shown: 0.0 points [-2.0, 2.0]")


def test_compare_arms_pairs_by_seed_and_says_what_is_missing() -> None:
    rng = np.random.default_rng(5)
    base = rng.uniform(0.3, 0.6, 8)
    table = pd.DataFrame(
        {
            "up": base + 0.1 + rng.normal(0, 0.002, 8),
            "grpo": base,
            "holes": np.where(np.arange(8) < 6, base + rng.normal(0, 0.002, 8), np.nan),
            "few": np.where(np.arange(8) < 3, base, np.nan),
        },
        index=pd.Index(range(10, 18), name="seed"),
    )
    found = compare_arms(table, "grpo")
    assert list(found.index) == ["up", "holes", "few"] and list(found["seeds"]) == [8, 6, 3]
    up, holes, few = (found.loc[arm] for arm in found.index)

    alone = paired_difference(table["up"], table["grpo"])
    assert (up["difference"], up["low"], up["high"], up["p"]) == (alone.mean, alone.low, alone.high, alone.p)
    assert up["mean"] == pytest.approx(table["up"].mean()) and up["p_holm"] == pytest.approx(2 * alone.p)
    assert up["verdict"].startswith("up better than grpo by 1") and "over 2 comparisons, 8 pairs" in up["verdict"]

    assert holes["mean"] - table["grpo"][:6].mean() == pytest.approx(holes["difference"])
    assert holes["verdict"].startswith("no difference shown") and "6 pairs" in holes["verdict"]
    assert holes["verdict"].endswith("2 of 8 seeds left out, missing in one of the two")

    assert few["verdict"].startswith(f"no interval: 3 pairs with grpo, at least {MIN_SEEDS} needed")
    none = compare_arms(table.assign(few=np.nan), "grpo").loc["few"]
    assert none["seeds"] == 0 and math.isnan(none["mean"]) and math.isnan(none["difference"])
    assert np.isnan(few[["low", "high", "p", "p_holm"]].to_numpy(float)).all() and few["difference"] == 0


def test_compare_arms_refuses_what_it_cannot_pair() -> None:
    table = pd.DataFrame({"a": np.arange(6.0), "b": np.arange(6.0)})
    with pytest.raises(ValueError, match=r"no arm 'c' in the table; its arms are \['a', 'b'\]"):
        compare_arms(table, "c")
    with pytest.raises(ValueError, match="no arm besides 'a'"):
        compare_arms(table[["a"]], "a")
    with pytest.raises(ValueError, match="occurs twice"):
        compare_arms(table.set_index(pd.Index([0, 1, 2, 3, 4, 4])), "a")
    with pytest.raises(ValueError, match="finite"):
        compare_arms(table.replace(5.0, np.inf), "a")


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_counts_the_draws_with_a_right_sample(n: int) -> None:
    for k in range(1, n + 1):
        expected = []
        for c in range(n + 1):
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            expected.append(sum(map(any, draws)) / len(draws))
        assert pass_at_k(np.arange(n + 1), n, k) == pytest.approx(expected)


def test_pass_at_k_of_many_samples_and_one_problem() -> None:
    assert pass_at_k(3, 10_000, 5_000) == pytest.approx(1 - math.comb(9_997, 5_000) / math.comb(10_000, 5_000))
    assert pass_at_k([[2, 4], [0, 8]], 8, 1) == pytest.approx(np.array([[0.25, 0.5], [0, 1]]))


@pytest.mark.parametrize(("c", "k"), [([3], 0), ([3], 9), ([9], 2), ([-1], 2), ([0.5], 2)])
def test_pass_at_k_refuses_impossible_counts(c: list[float], k: int) -> None:
    with pytest.raises(ValueError, match="must"):
        pass_at_k(c, 8, k)


def test_area_is_the_mean_height() -> None:
    # Trapezia 0.5 x 1 + 1.0 x 3 over a range of 4.
    assert area_under_curve([2, 3, 6], [0.0, 1.0, 1.0]) == pytest.approx(3.5 / 4)
    assert area_under_curve([0, 10, 500], [0.3, 0.3, 0.3]) == pytest.approx(0.3)


def test_first_reaching_interpolates_or_is_nan() -> None:
    x, y = [0, 100, 200, 300], [0.1, 0.3, 0.2, 0.6]
    assert first_reaching(x, y, 0.2) == pytest.approx(50)
    assert first_reaching(x, y, 0.5) == pytest.approx(275)
    assert first_reaching(x, y, 0.05) == 0 and first_reaching(x, y, 0.6) == 300
    assert math.isnan(first_reaching(x, y, 0.61))


@pytest.mark.parametrize(
    ("x", "y"), [([], []), ([0, 0], [1, 2]), ([1, 0], [1, 2]), ([0, 1], [1]), ([0, 1], [1, np.nan])]
)
def test_curves_that_are_none_are_refused(x: list[float], y: list[float]) -> None:
    for measure in (area_under_curve, lambda x, y: first_reaching(x, y, 0.5)):
        with pytest.raises(ValueError, match="curve needs|finite"):
            measure(x, y)
    with pytest.raises(ValueError, match="at least twice"):
        area_under_curve([0], [1])


def test_restrict_keeps_the_seeds_that_never_arrive() -> None:
    values, arrived = restrict([10.0, math.nan, 120.0, 100.0], 100.0)
    assert values.tolist() == [10, 100, 100, 100] and arrived.tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match="budget"):
        restrict([1.0], math.nan)
