"""A reward model's score as rewards per token, from a recipe's option to what a trainer is given."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from hapo.tasks import TaskConfig, attribution, load_task
from hapo.tasks.reward_options import CHANNELS, TokenRewardOptions
from hapo.tasks.token_reward import ModelReward, TokenReward
from tests.cli.reward_model import random_reward_model

GAME = {"000": 0.2, "100": 0.5, "010": 0.1, "001": 0.4, "110": 0.9, "101": 0.8, "011": 0.3, "111": 1.4}
MASK = 9


class WorkedModel:
    """The reward model of the spec's worked example: three tokens of an answer after one of the prompt."""

    mask_id, special_ids, identity = MASK, frozenset(), "worked"
    tokenizer = staticmethod(lambda text: SimpleNamespace(input_ids=[[1] for _ in text]))

    def __init__(self, broken: bool = False) -> None:
        self.calls, self.broken = 0, broken

    def __call__(self, rows):
        self.calls += len(rows)
        kept = ["".join("01"[token != MASK] for token in row[1:]) for row in rows]
        return [math.nan if self.broken else GAME[bits] if len(bits) == 3 else 0.7 for bits in kept]


def reward(weights, model=None, **options) -> TokenReward:
    told = TokenRewardOptions(model="worked", weights=weights, **options)
    told.__dict__["loaded"] = WorkedModel() if model is None else model
    return TokenReward(told)


def shaped(weights, **options) -> list[float]:
    return reward(weights, **options)(["p"], ["a"], [[2, 3, 4]])[0]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("normalised", [0.576425, 0.242883, 0.580692]), ("additive", [0.594621, 0.226783, 0.555430])],
)
def test_the_worked_example_of_the_spec(mode, expected):
    assert shaped([0.5, 0.3, 0.2], mode=mode) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("weights", [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.25, 0.5, 0.25], [0.0, 0.0, 1.0]])
def test_in_the_normalised_mode_the_rewards_of_an_answer_add_up_to_its_score(weights):
    assert math.fsum(shaped(weights)) == pytest.approx(1.4, abs=1e-12)


@pytest.mark.parametrize(
    "channels", [["shap", "lime", "sparse"], ["sparse", "shap", "lime"], ["lime", "shap", "sparse"]]
)
def test_weights_go_by_the_names_of_their_channels(channels):
    weights = {"shap": 0.5, "lime": 0.3, "sparse": 0.2}
    found = shaped([weights[name] for name in channels], channels=channels)
    assert found == pytest.approx([0.576425, 0.242883, 0.580692], abs=1e-6)


def test_the_sparse_vertex_is_the_score_on_the_last_token_and_scores_each_answer_once():
    model = WorkedModel()
    assert reward([0.0, 0.0, 1.0], model)(["p"] * 2, ["a"] * 2, [[2, 3, 4], [2, 3, 5]]) == [[0.0, 0.0, 1.4]] * 2
    assert model.calls == 2
    assert shaped([1.0], channels=["sparse"]) == [0.0, 0.0, 1.4]


def test_rewards_are_linear_in_the_weights():
    one, other = [0.6, 0.1, 0.3], [0.1, 0.7, 0.2]
    mixed = [0.3 * a + 0.7 * b for a, b in zip(one, other, strict=True)]
    expected = [0.3 * a + 0.7 * b for a, b in zip(shaped(one), shaped(other), strict=True)]
    assert shaped(mixed) == pytest.approx(expected, abs=1e-12)


def test_answers_of_several_lengths_have_as_many_rewards_as_tokens():
    ids = [[2, 3, 4], [5], [], [6, 7]]
    found = reward([0.5, 0.3, 0.2])(["p"] * 4, ["a"] * 4, ids)
    assert [len(row) for row in found] == [3, 1, 0, 2]
    assert found[1] == [pytest.approx(0.7)]


def test_a_score_that_is_not_finite_is_no_reward():
    model = WorkedModel(broken=True)
    assert reward([0.5, 0.3, 0.2], model)(["p"], ["a"], [[2, 3, 4]]) == [None]
    options = TokenRewardOptions(model="worked")
    options.__dict__["loaded"] = model
    assert ModelReward(options)(["p"], ["a"], [[2, 3, 4]]) == [None]
    model.broken = False
    assert ModelReward(options)(["p"] * 2, ["a"] * 2, [[2, 3, 4], [2, MASK, 4]]) == [1.4, 0.8]


@pytest.mark.parametrize("told", ["[1, 2]", "{", '{"model": "m", "weight": [1]}', "{}"])
def test_what_is_no_mapping_of_the_option_is_refused(told):
    with pytest.raises(ValueError, match="token_reward"):
        TaskConfig(token_reward=told)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", 0.5),
        ("weights", "abc"),
        ("channels", "shap"),
        ("channels", None),
        ("normalisation", "sum"),
        ("cache", 3),
        ("seed", -1),
        ("seed", "x"),
        ("batch_size", True),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_name(name, value):
    with pytest.raises(ValueError, match=f"token_reward: {name} must .*got {value!r}"):
        TokenRewardOptions.read({"model": "reward_tiny", name: value})


def test_prompts_as_messages_need_a_chat_template():
    model = WorkedModel()
    model.tokenizer = SimpleNamespace(chat_template=None)
    with pytest.raises(ValueError, match="no chat template: set chat to false"):
        reward([0.5, 0.3, 0.2], model)([[{"role": "user", "content": "a"}]], ["a"], [[2, 3, 4]])


def test_a_flag_takes_back_what_a_recipe_says():
    assert TaskConfig(token_reward="none").token_reward is None
    with pytest.raises(ValueError, match="reward_model is the model of token_reward, which is not given"):
        TaskConfig(rewards=["reward_model"])


def test_problems_without_answers_are_measured_by_the_reward_model(tmp_path):
    model = random_reward_model(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": f"{n}+1="}) + "\n" for n in range(12)))
    config = TaskConfig(
        dataset=str(tmp_path / "data.jsonl"),
        eval_size=4,
        rewards=["reward_model"],
        token_reward={"model": str(model), "channels": ["shap", "sparse"], "weights": [0.5, 0.5], "samples": 16},
    )
    task = load_task(config, seed=0)
    (score,) = task.reward_funcs
    ids = task.token_reward.options.loaded.tokenizer(["1+1=2", "2"]).input_ids
    whole = score(prompts=["7+1="] * 2, completions=["1+1=2", "2"], completion_ids=ids)
    spread = task.token_reward(prompts=["7+1="] * 2, completions=["1+1=2", "2"], completion_ids=ids)
    assert [math.fsum(row) for row in spread] == pytest.approx(whole, rel=1e-6)
    assert [len(row) for row in spread] == [len(row) for row in ids]
    config.rewards = ["exact"]
    with pytest.raises(ValueError, match="no column 'answer'"):
        load_task(config, seed=0)


def test_the_channels_of_a_recipe_are_those_of_attribution():
    assert CHANNELS == attribution.CHANNELS
