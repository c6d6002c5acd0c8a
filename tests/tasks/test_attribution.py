"""Channels of attribution: what is a player, what is scored and how often, what is kept, and the libraries' traps."""

import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import LimeBase
from hypothesis import given, settings
from hypothesis import strategies as st

from hapo.tasks.explainers import captum_shapley, local_model, shapley_values
from hapo.tasks.shapley import lime

from .counted_score import END, MASK, WORTH, Counted, attribution, drawn

EXAMPLE = {"000": 0.2, "100": 0.5, "010": 0.1, "001": 0.4, "110": 0.9, "101": 0.8, "011": 0.3, "111": 1.4}


def test_the_worked_example():
    """Tokens 5, 6, 7 behind the prompt 4; 0 masks."""
    score = lambda rows: [EXAMPLE["".join("0" if token == MASK else "1" for token in row[1:])] for row in rows]  # noqa: E731
    found = attribution(score)([[4]], [[5, 6, 7]])[0]
    assert (found.score, found.empty, found.players, found.passes) == (1.4, 0.2, 3, 8)
    assert found.channels["shap"] == pytest.approx([0.666667, 0.216667, 0.316667], abs=1e-6)
    assert found.channels["lime"] == pytest.approx([0.870959, 0.394832, 0.390323], abs=1e-6)
    assert found.channels["sparse"] == [0.0, 0.0, 1.4]
    assert found.gap == pytest.approx(0.0, abs=1e-12) and found.finite


def test_only_tokens_of_the_completion_play():
    """The prompt and special tokens stay in every row, and rows keep their length."""
    score = Counted()
    found = attribution(score)([[2, 3, END]], [[7, END, 8, END]])[0]
    assert set(score.rows) == {(2, 3, END, a, END, b, END) for a in (7, MASK) for b in (8, MASK)}
    assert found.channels["shap"][1] == found.channels["shap"][3] == 0.0 == found.channels["lime"][1]
    assert found.channels["sparse"] == [0.0, 0.0, 0.0, found.score]


@settings(max_examples=25)
@given(length=st.integers(0, 40), seed=st.integers(0, 5), samples=st.sampled_from([8, 64, 256]))
def test_shapley_values_add_up_whatever_the_length(length, seed, samples):
    score = Counted()
    found = attribution(score, samples=samples, channels=["shap"])(*drawn([length], seed))[0]
    assert found.gap == pytest.approx(0.0, abs=1e-9)
    assert sum(found.channels["shap"]) == pytest.approx(found.score - found.empty, abs=1e-9)
    assert len(found.channels["shap"]) == length and found.players == min(length, samples // 4)
    assert found.passes == len(set(score.rows)) <= max(samples, 2)


def test_neighbours_of_a_long_completion_play_together_with_equal_parts():
    score = Counted()
    found = attribution(score, samples=16)(*drawn([10]))[0]
    phi = found.channels["shap"]
    assert found.players == 4 and len(set(phi)) == 4
    assert phi[0] == phi[1] == phi[2] != phi[3] and phi[8] == phi[9]
    for row in score.rows:
        assert len({token == MASK for token in row[2:5]}) == 1


def test_estimates_are_near_the_exact_values():
    rows = drawn([11] * 4)
    exact = attribution(Counted(), samples=2048)(*rows)
    for name, at_most in (("shap", 0.1), ("lime", 0.5)):
        for one, other in zip(attribution(Counted(), samples=256)(*rows), exact, strict=True):
            error = np.square(np.subtract(one.channels[name], other.channels[name])).mean() ** 0.5
            assert 0 < error < at_most * np.std(other.channels[name])


def test_captum_agrees():
    """Permutations come to the same Shapley values; its regression on our masks to the same coefficients."""
    rows = drawn([6])
    options = {"samples": 4096, "channels": ["shap", "captum"], "explainers": {"captum": captum_shapley}}
    found = attribution(Counted(), **options)(*rows)[0]
    error = np.subtract(found.channels["captum"], found.channels["shap"])
    assert 0 < np.abs(error).max() < 0.02
    assert sum(found.channels["captum"]) == pytest.approx(found.score - found.empty, abs=1e-5)

    seen = []

    class Regression:
        def fit(self, data):
            (seen_masks, values, _) = next(iter(data))
            self.phi = lime(seen_masks.bool().numpy(), values.double().numpy())[1]
            seen.append(len(values))

        def representation(self):
            return torch.tensor(self.phi)

    def f(masks):
        return np.tanh(masks @ WORTH[:6])

    def through_captum(f, players, samples, seed):
        from hapo.tasks.shapley import lime_masks

        masks = iter(lime_masks(players, samples, np.random.default_rng(seed)))
        explainer = LimeBase(
            lambda x: torch.tensor(f(x.bool().numpy())),
            Regression(),
            similarity_func=lambda *args: 1.0,
            perturb_func=lambda *args: torch.tensor(next(masks)[None]).float(),
            perturb_interpretable_space=True,
            from_interp_rep_transform=lambda mask, *args: mask,
            to_interp_rep_transform=None,
        )
        return explainer.attribute(torch.ones(1, players), n_samples=samples, perturbations_per_eval=7).numpy()

    assert through_captum(f, 6, 40, 3) == pytest.approx(local_model(f, 6, 40, 3), abs=1e-5) and seen == [40]


def test_equal_rows_are_scored_once_and_calls_are_full():
    """Masks of several completions, of both explainers, in as few calls as there are full batches."""
    score = Counted()
    prompts, completions = drawn([4, 6, 12, 12])
    found = attribution(score, batch_size=100)([*prompts, [2, 3]], [*completions, completions[2]])
    assert len(score.rows) == len(set(score.rows)) == sum(one.passes for one in found)
    assert [len(call) for call in score.calls[:-1]] == [100] * (len(score.calls) - 1)
    assert any(len({len(row) for row in call}) > 1 for call in score.calls)  # of several completions
    assert found[4].channels == found[2].channels and found[4].passes == 0 < found[2].passes


def test_what_a_completion_gets_depends_on_it_and_on_the_seed_alone():
    prompts, completions = drawn([14, 9, 20])
    together = attribution(Counted(), batch_size=7)(prompts, completions)
    for one, prompt, completion in zip(together, prompts, completions, strict=True):
        assert attribution(Counted())([prompt], [completion])[0] == one
    assert attribution(Counted())(prompts[::-1], completions[::-1]) == together[::-1]
    other = attribution(Counted(), seed=1)(prompts, completions)
    assert other[0].channels["shap"] != together[0].channels["shap"]


def test_the_spread_between_seeds():
    """Nothing where the values are exact; less with more samples; of the order of the true error."""
    rows = drawn([5, 12])
    few, many = (attribution(Counted(), samples=n).between_seeds(*rows, range(6)) for n in (64, 1024))
    assert few[0]["shap"] == few[0]["lime"] == few[1]["sparse"] == 0.0
    assert few[1]["shap"] > 2 * many[1]["shap"] > 0
    exact = attribution(Counted(), samples=2**12, channels=["shap"])(*rows)[1].channels["shap"]
    error = np.subtract(attribution(Counted(), samples=64)(*rows)[1].channels["shap"], exact)
    assert 0.3 < np.sqrt(np.square(error).mean()) / few[1]["shap"] < 3
    with pytest.raises(ValueError, match="at least two, got"):
        attribution(Counted()).between_seeds(*rows, [3])


def test_a_score_that_is_not_finite_leaves_no_attribution_and_the_sparse_reward():
    """Without token 7 there is no score. The other completion is not touched."""
    found = attribution(Counted(without=7))([[2, 3], [2, 7]], [[7, 8], [8, 9]])
    assert not found[0].finite and math.isfinite(found[0].score) and math.isnan(found[0].gap)
    assert all(math.isnan(x) for name in ("shap", "lime") for x in found[0].channels[name])
    assert found[0].channels["sparse"] == [0.0, found[0].score]
    assert found[1].finite


@pytest.mark.parametrize("scale", [1e-4, 0.01])
def test_small_scores_have_attributions(scale):
    """captum's own Lime is 0 everywhere here: its penalty knows no scale."""
    rows = drawn([5, 20])
    for small, whole in zip(attribution(Counted(scale))(*rows), attribution(Counted())(*rows), strict=True):
        for name in ("shap", "lime"):
            assert small.channels[name] == pytest.approx(scale * np.array(whole.channels[name]), abs=1e-9 * scale)
            assert all(small.channels[name])


def test_a_mixture_adds_up_the_channels():
    """The spec's additive form: what is not explained is f(0) for Shapley values. NaN gives way to the sparse reward."""
    score = lambda rows: [EXAMPLE["".join("0" if token == MASK else "1" for token in row[1:])] for row in rows]  # noqa: E731
    found = attribution(score)([[4]], [[5, 6, 7]])[0]
    mixed = found.mixture({"shap": 0.5, "lime": 0.3, "sparse": 0.2})
    assert mixed == pytest.approx([0.594621, 0.226783, 0.555430], abs=1e-6) and sum(mixed) == pytest.approx(
        1.376834
    )
    assert found.mixture({"sparse": 1.0}) == found.channels["sparse"]
    with pytest.raises(ValueError, match="no channel 'attention' here, only shap, lime, sparse"):
        found.mixture({"attention": 1.0})
    unscored = attribution(Counted(without=7))([[2, 3]], [[7, 8]])[0]
    assert unscored.mixture({"shap": 0.75, "sparse": 0.25}) == [0.0, pytest.approx(unscored.score)]


def test_edges():
    none, special, one = attribution(Counted())([[2]] * 3, [[], [END, END], [5]])
    assert none.channels == {"shap": [], "lime": [], "sparse": []} and none.players == 0
    assert special.channels["shap"] == [0.0, 0.0] and special.score == special.empty
    assert one.channels["shap"] == [pytest.approx(one.score - one.empty)] == one.channels["lime"]
    assert attribution(Counted())([], []) == []
    sparse = attribution(score := Counted(), channels=["sparse"])([[2]], [[5, 6]])[0]
    assert len(score.rows) == 1 and math.isnan(sparse.empty) and math.isnan(sparse.gap)


def test_what_cannot_be_honoured():
    score = Counted()
    for options, message in (
        ({"channels": ["shapely"]}, "no channel 'shapely': choose among shap, lime, attention, sparse"),
        ({"channels": []}, "one or more"),
        ({"channels": ["shap", "shap"]}, "each once"),
        ({"samples": 7}, "samples must be at least 8"),
        ({"batch_size": 0}, "batch_size 1, got 256 and 0"),
        ({"mask_id": None}, "nothing to mask tokens with: give mask_id"),
        ({"channels": ["attention"]}, "attention needs a hapo.tasks.reward_model.RewardModel"),
        ({"cache": "nowhere"}, "give identity"),
    ):
        with pytest.raises(ValueError, match=message):
            attribution(score, **options)
    with pytest.raises(ValueError, match="1 prompts and 2 completions"):
        attribution(score)([[2]], [[5], [6]])
    with pytest.raises(ValueError, match="returned 3 numbers for 4 rows"):
        attribution(lambda rows: [0.0] * (len(rows) - 1))([[2]], [[5, 6]])
    chance = np.random.default_rng(0)
    unruly = {"shap": lambda f, players, samples, seed: f(chance.random((20, players)) < 0.5)[:players]}
    with pytest.raises(ValueError, match="asks for other masks whenever it is called"):
        attribution(score, samples=40, explainers=unruly)([[2]], [list(range(5, 60))])


def test_an_explainer_of_ones_own_may_look_before_it_asks():
    """Occlusion in two rounds, through the same batches."""

    def occlusion(f, players, samples, seed):
        whole = f(np.ones((1, players), bool))
        return whole - f(~np.eye(players, dtype=bool))

    options = {"channels": ["occlusion", "shap"], "explainers": {"occlusion": occlusion}}
    score = Counted()
    found = attribution(score, **options)([[2, 3]], [[4, 5, 6]])[0]
    expected = [
        score.of([2, 3, 4, 5, 6]) - score.of(row) for row in ([2, 3, 0, 5, 6], [2, 3, 4, 0, 6], [2, 3, 4, 5, 0])
    ]
    assert found.channels["occlusion"] == pytest.approx(expected)
    assert shapley_values(lambda masks: masks.sum(1) * 2.0, 3, 8, 0) == pytest.approx([2, 2, 2])


# ---- what is kept


def test_what_is_kept_is_not_scored_again(tmp_path):
    rows = drawn([4, 12])
    options = {"cache": tmp_path / "a" / "b", "identity": "one"}
    first = attribution(Counted(), **options)(*rows)
    score = Counted()
    again = attribution(score, **options)(*rows)
    assert not score.calls and [one.passes for one in again] == [0, 0]
    assert [one.channels for one in again] == [one.channels for one in first]
    attribution(score, **options, samples=300)(*rows)
    assert 0 < len(score.rows) < 600  # scores of masks that both ask for are known
    for other in ({"identity": "two"}, {"mask_id": 99}, {"special_ids": []}):
        attribution(score := Counted(), **{**options, **other})(*rows)
        assert len(score.rows) == len(set(score.rows)) > 300
    attribution(score := Counted(), **options, seed=1)(*rows)
    assert 0 < len(score.rows) < 600


def test_scores_that_are_not_finite_are_kept_as_such(tmp_path):
    options = {"cache": tmp_path, "identity": "one"}
    for passes in (4, 0):
        found = attribution(Counted(without=7), **options)([[2, 3]], [[7, 8]])[0]
        assert math.isnan(found.empty) and not found.finite and found.passes == passes
    attribution(score := Counted(without=7), **options, seed=5)([[2, 3]], [[7, 8]])
    assert not score.calls


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from counted_score import Counted, attribution, drawn

class Dying(Counted):
    def __call__(self, rows):
        if len(self.calls) == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(rows)

attribution(Dying(), cache=sys.argv[2], identity="one", batch_size=50)(*drawn([9, 12, 30]))
"""


def test_a_kill_loses_the_call_of_the_score_that_it_fell_into(tmp_path):
    rows, here = drawn([9, 12, 30]), str(Path(__file__).parent)
    whole = Counted()
    expected = attribution(whole, batch_size=50)(*rows)
    run = [sys.executable, "-c", KILLED, here, str(tmp_path), "7"]
    assert subprocess.run(run, check=False).returncode == -signal.SIGKILL
    rest = Counted()
    found = attribution(rest, cache=tmp_path, identity="one", batch_size=50)(*rows)
    assert sorted(whole.rows[350:]) == sorted(rest.rows)
    assert [one.channels for one in found] == [one.channels for one in expected]


def test_a_file_that_is_no_cache_is_left(tmp_path):
    file = tmp_path / "attribution.sqlite"
    file.write_text("mine, and long enough to be no empty database" * 30)
    with pytest.raises(ValueError, match="is no cache of attributions: .*move it"):
        attribution(Counted(), cache=tmp_path, identity="one")
    assert file.read_text().startswith("mine")
