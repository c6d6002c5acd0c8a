"""Shapley values and the two regressions: the worked example of the spec, axioms, limits."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hapo.tasks.shapley import all_masks, kernel_masks, kernel_shap, lime, lime_masks, shapley

EXAMPLE = {"000": 0.2, "100": 0.5, "010": 0.1, "001": 0.4, "110": 0.9, "101": 0.8, "011": 0.3, "111": 1.4}
VALUES = np.array([EXAMPLE["".join("01"[bit] for bit in mask)] for mask in all_masks(3).astype(int)])

games = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.floats(-10, 10, width=32), min_size=2**n, max_size=2**n).map(np.array)
)


def players_of(values):
    return len(values).bit_length() - 1


def by_permutations(values):
    """The definition in its other form: the mean over all orders of what a player adds when it comes."""
    players = players_of(values)
    phi = np.zeros(players)
    for order in itertools.permutations(range(players)):
        row = 0
        for player in order:
            phi[player] += values[row + (1 << player)] - values[row]
            row += 1 << player
    return phi / math.factorial(players)


def test_the_worked_example():
    assert shapley(VALUES) == pytest.approx([0.666667, 0.216667, 0.316667], abs=1e-6)
    assert shapley(VALUES).sum() == pytest.approx(1.2)
    intercept, phi = lime(all_masks(3), VALUES, width=0.25)
    assert intercept == pytest.approx(-0.352963, abs=1e-6)
    assert phi == pytest.approx([0.870959, 0.394832, 0.390323], abs=1e-6)
    assert np.exp(phi) / np.exp(phi).sum() == pytest.approx([0.446514, 0.277367, 0.276119], abs=1e-6)


@given(values=games)
def test_efficiency_and_the_definition(values):
    phi = shapley(values)
    assert phi == pytest.approx(by_permutations(values), abs=1e-9)
    assert phi.sum() == pytest.approx(values[-1] - values[0], abs=1e-9)


@given(values=games, data=st.data())
def test_symmetry(values, data):
    """Two players who are interchangeable have equal values."""
    players = players_of(values)
    one, other = data.draw(st.tuples(*[st.integers(0, players - 1)] * 2))
    swapped = all_masks(players)
    swapped[:, [one, other]] = swapped[:, [other, one]]
    same = (values + values[swapped @ (1 << np.arange(players))]) / 2
    phi = shapley(same)
    assert phi[one] == pytest.approx(phi[other], abs=1e-9)


@given(values=games, data=st.data())
def test_a_null_player_has_nothing(values, data):
    players = players_of(values)
    player = data.draw(st.integers(0, players - 1))
    ignorant = values[np.arange(2**players) & ~(1 << player)]
    assert shapley(ignorant)[player] == 0.0


@given(values=games, other=st.floats(-3, 3))
def test_linearity(values, other):
    more = np.sin(values)
    assert shapley(values + other * more) == pytest.approx(shapley(values) + other * shapley(more), abs=1e-9)


@given(values=games, seed=st.integers(0, 9), more=st.integers(0, 40))
def test_kernel_shap_with_all_masks_is_exact(values, seed, more):
    players = players_of(values)
    masks, weights = kernel_masks(players, 2**players - 2 + more, np.random.default_rng(seed))
    assert len(masks) == 2**players - 2
    found = kernel_shap(masks, weights, values[masks @ (1 << np.arange(players))], values[-1], values[0])
    assert found == pytest.approx(shapley(values), abs=1e-10)


@pytest.mark.parametrize("players", [1, 2, 3, 6, 9, 30])
@pytest.mark.parametrize("count", [6, 50, 300])
def test_masks_of_the_kernel_keep_to_the_budget_and_stand_in_pairs(players, count):
    masks, weights = kernel_masks(players, count, np.random.default_rng(0))
    assert len(masks) == len(weights) <= count
    rows = {mask.tobytes(): weight for mask, weight in zip(masks, weights, strict=True)}
    assert len(rows) == len(masks)  # none twice
    for mask, weight in zip(masks, weights, strict=True):
        assert rows[(~mask).tobytes()] == pytest.approx(weight)
        assert 0 < mask.sum() < players
    total = sum((players - 1) / (s * (players - s)) for s in range(1, players))
    assert len(masks) == 0 or weights.sum() == pytest.approx(total)


def test_sampled_values_meet_the_constraint_and_come_nearer():
    rng = np.random.default_rng(1)
    linear, pairs = rng.normal(size=12), np.triu(rng.normal(size=(12, 12)), 1)

    def f(masks):
        return np.tanh(masks @ linear + ((masks @ pairs) * masks).sum(1))

    ends = f(np.array([[1.0] * 12, [0.0] * 12]))
    exact = shapley(f(all_masks(12).astype(float)))

    def error(count):
        errors = []
        for seed in range(8):
            masks, weights = kernel_masks(12, count, np.random.default_rng(seed))
            phi = kernel_shap(masks, weights, f(masks.astype(float)), *ends)
            assert phi.sum() == pytest.approx(ends[0] - ends[1], abs=1e-9)
            errors.append(np.square(phi - exact).mean())
        return np.sqrt(np.mean(errors))

    few, more, most = (error(count) for count in (60, 240, 960))
    assert few > 1.5 * more > 2.25 * most > 0


def test_additive_games_are_found_exactly_by_both_regressions():
    weights = np.random.default_rng(0).normal(size=20)
    masks, kernel = kernel_masks(20, 80, np.random.default_rng(0))
    assert kernel_shap(masks, kernel, masks @ weights, weights.sum(), 0.0) == pytest.approx(weights, abs=1e-9)
    masks = lime_masks(20, 80, np.random.default_rng(0))
    intercept, phi = lime(masks, masks @ weights + 3)
    assert phi == pytest.approx(weights, abs=1e-9) and intercept == pytest.approx(3)


def test_of_many_players_each_keeps_its_value():
    """No feature selection: a library's default keeps 10 features, and the rest is 0."""
    weights = np.linspace(1, 2, 64)
    masks, kernel = kernel_masks(64, 300, np.random.default_rng(0))
    assert kernel_shap(masks, kernel, masks @ weights, weights.sum(), 0.0) == pytest.approx(weights, abs=1e-8)


@pytest.mark.parametrize("scale", [1e-6, 0.01, 1e6])
@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_lime_knows_no_scale(scale, ridge):
    """A penalty that is absolute makes every coefficient of small scores 0."""
    _, phi = lime(all_masks(3), VALUES, ridge=ridge)
    _, scaled = lime(all_masks(3), scale * VALUES, ridge=ridge)
    assert scaled == pytest.approx(scale * phi) and (scaled != 0).all()


def test_a_ridge_shrinks_and_leaves_the_intercept_free():
    _, phi = lime(all_masks(3), VALUES + 100, ridge=1.0)
    assert (np.abs(phi) < np.abs(lime(all_masks(3), VALUES)[1])).all()
    intercept, phi = lime(all_masks(3), VALUES + 100, ridge=1e9)
    assert phi == pytest.approx([0, 0, 0], abs=1e-6) and intercept > 99


def test_masks_of_lime():
    masks = lime_masks(10, 2001, np.random.default_rng(0))
    assert masks.shape == (2001, 10) and masks[0].all() and not masks[1:].all(1).any()
    sizes = np.bincount(masks[1:].sum(1), minlength=10)
    assert (np.abs(sizes - 200) < 60).all()  # each number of missing players as likely
    assert np.abs(masks[1:].mean(0) - 0.45).max() < 0.05


def test_edges():
    assert shapley(np.array([3.0])).shape == (0,)
    assert shapley(np.array([3.0, 5.0])) == pytest.approx([2.0])
    assert all_masks(0).shape == (1, 0)
    masks, weights = kernel_masks(1, 10, np.random.default_rng(0))
    assert kernel_shap(masks, weights, np.zeros(0), 5.0, 3.0) == pytest.approx([2.0])
    assert lime(all_masks(0), np.array([3.0]))[0] == 3.0
    with pytest.raises(ValueError, match="all masks of 21 players"):
        all_masks(21)
    with pytest.raises(ValueError, match=r"need all 2\^n values, got \(3,\)"):
        shapley(np.zeros(3))
    for options in ({"width": 0.0}, {"ridge": -1.0}, {"width": math.nan}):
        with pytest.raises(ValueError, match="LIME needs a width above 0"):
            lime(all_masks(3), VALUES, **options)
