"""`hapo train` by the score of a reward model, spread over the tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hapo.cli import main
from hapo.insight.run import Run
from tests.cli.reward_model import random_reward_model
from tests.cli.small import evaluations, train


@pytest.mark.parametrize(
    ("told", "options", "message"),
    [
        (
            {},
            {},
            "token_reward has no weights for its channels shap, sparse: give shares that add up to 1, or let hapo",
        ),
        ({"weights": [0.5, 0.5]}, {"method_options": "{}"}, "method_options to {advantage: token_reward}"),
        ({"weights": [0.5, 0.5]}, {"reward_weights": 2.0}, "reward_weights weighs several rewards"),
        ({"weights": [0.5, 0.4]}, {}, "weights must be numbers >= 0 that add up to 1"),
    ],
)
def test_training_by_a_token_reward_that_does_not_go_together_is_refused(told, options, message, tmp_path, capsys):
    reward = {"model": str(random_reward_model(tmp_path / "model")), "channels": ["shap", "sparse"], **told}
    argv = train(tmp_path / "run", config="shape", token_reward=json.dumps(reward), **options)
    assert main(argv) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_by_token_rewards_records_them_and_is_measured_by_whole_answers(tmp_path):
    reward = {"model": str(random_reward_model(tmp_path / "model")), "channels": ["shap", "sparse"], "samples": 16}
    reward["weights"] = [0.5, 0.5]
    argv = train(
        tmp_path / "run", config="shape", token_reward=json.dumps(reward), max_steps=2, record_tokens_every=1
    )
    assert main(argv) == 0
    table = Run(tmp_path / "run").tokens()
    totals = table.groupby(["rollout", "step", "response"])[["token_reward", "reward"]].agg(
        {"token_reward": "sum", "reward": "first"}
    )
    assert (
        np.allclose(totals["token_reward"], totals["reward"], atol=1e-5) and table["token_reward"].nunique() > 10
    )
    assert {line["binary"] for line in evaluations(tmp_path / "run")} == {
        True
    }  # the parity reward, no model's score
