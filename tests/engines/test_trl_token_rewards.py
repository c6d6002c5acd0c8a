"""Reward functions that return a list for a completion, in the TRL engine and in `hapo train`."""

import json
import logging
import math

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator

import hapo
from hapo.engines.trl.rows import RolloutRows, prepare_rows
from hapo.engines.trl.token_rewards import TokenRewards
from hapo.parts.credit import onto_valid_tokens
from tests.engines import tiny
from tests.engines.test_trl_methods import recorded, train
from tests.examples import one_step

BY_TOKEN = {"advantage": "token_reward"}


def digit_by_digit(completions, completion_ids, **_):
    """1 for each token that is a digit of the alphabet, else -0.25."""
    return [[1.0 if 2 <= i <= 11 else -0.25 for i in ids] for ids in completion_ids]


def on_last(completions, completion_ids, **_):
    """`tiny.count_digits`, written as lists."""
    totals = tiny.count_digits(completions)
    return [[0.0] * (len(ids) - 1) + [r] for ids, r in zip(completion_ids, totals, strict=True)]


async def later(completions, completion_ids, **_):
    return digit_by_digit(completions, completion_ids)


@pytest.fixture
def alone():
    return Accelerator(cpu=True)


def watch(accelerator: Accelerator, *functions) -> tuple[TokenRewards, list]:
    rewards = TokenRewards(accelerator)
    return rewards, rewards.watched(functions, [f.__name__ for f in functions])


IDS = [[5, 6, 7], [5, 1], [9]]
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()


def test_lists_and_numbers_are_weighed_and_added_up(alone):
    """A number stands on the last token; None adds nothing; a function may mix all three."""
    rewards, (mixed, number) = watch(alone, mixed_up, whole)
    outcomes = [f(prompts=["p"] * 3, completions=["a", "b", "c"], completion_ids=IDS) for f in (mixed, number)]
    assert outcomes == [[6.0, None, 0.5], [10.0, 20.0, None]]
    per_func = torch.tensor([[6.0, 10.0], [math.nan, 20.0], [0.5, math.nan]])
    per_token = rewards.of(per_func, torch.tensor([0.5, 2.0]), MASK, wanted=True)
    assert per_token.tolist() == [[0.5, 1.0, 21.5], [0.0, 40.0, 0.0], [0.25, 0.0, 0.0]]


def mixed_up(**_):
    return [[1.0, 2.0, 3.0], None, 0.5]


def whole(**_):
    return [10.0, 20.0, None]


def test_arrays_are_lists_too(alone):
    def arrays(**_):
        return [torch.tensor([1.0, 2.0, 3.0]), np.array([0.5, 0.5]), (2,)]

    rewards, (function,) = watch(alone, arrays)
    assert function(completion_ids=IDS) == [6.0, 1.0, 2.0]
    per_token = rewards.of(torch.tensor([[6.0], [1.0], [2.0]]), torch.ones(1), MASK, wanted=False)
    assert per_token.tolist() == [[1.0, 2.0, 3.0], [0.5, 0.5, 0.0], [2.0, 0.0, 0.0]]


def test_what_a_tool_s_answer_earns_the_call_earned():
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    rewards = torch.tensor([[1.0, 2, 4, 8, 16], [1, 2, 4, 8, 16], [1, 2, 4, 8, 16]])
    assert onto_valid_tokens(rewards, mask).tolist() == [[7, 0, 0, 24, 0], [0, 3, 28, 0, 0], [0] * 5]


WRONG = [
    ([[1.0, 2.0], [1.0, 1.0], [1.0]], r"returned a list of 2 for a completion of 3 tokens \(row 0 of 3"),
    ([[1.0] * 3, [1.0, math.nan], [1.0]], r"returned nan for token 1 of 2, not a finite number \(row 1 of 3"),
    ([[1.0] * 3, [1.0, "2"], [1.0]], r"returned '2' for token 1 of 2, not a finite number \(row 1 of 3"),
    ([[1.0] * 3, [1.0, None], [1.0]], r"returned None for token 1 of 2"),
    ([[1.0] * 3, [1.0, 1.0], [[1.0]]], r"returned \[1.0\] for token 0 of 1"),
    ([[1.0] * 3, [1.0, 1.0], []], r"returned a list of 0 for a completion of 1 tokens \(row 2 of 3"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=["length", "nan", "text", "none", "nested", "empty"])
def test_what_is_no_reward_per_token_is_named(alone, values, message):
    def mine(**_):
        return values

    _, (function,) = watch(alone, mine)
    with pytest.raises(ValueError, match=f"the reward function 'mine' {message}"):
        function(completion_ids=IDS)


def test_a_length_penalty_lands_on_the_last_token(alone):
    rollout = {
        "completion_ids": torch.zeros(4, 3, dtype=torch.long),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]]),
        "old_per_token_logps": torch.full((4, 3), -1.0),
        "old_entropies": torch.ones(4, 3),
        "verdict": torch.tensor([1.0, 0.5, math.nan, 0.0]),
        "token_reward": torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]),
    }
    method = hapo.method("dr_grpo", **BY_TOKEN)
    prepare_rows(method, rollout, alone, group_size=4, punish=lambda n: -0.1 * n).rows.put(rollout)
    batch = RolloutRows.of(rollout).batch
    torch.testing.assert_close(batch.token_reward[:2], torch.tensor([[0.5, 0.5, -0.3], [0.0, 0.3, 0.0]]))
    torch.testing.assert_close(batch.reward[[0, 1, 3]], torch.tensor([0.7, 0.3, 0.0]))
    # Columns: (0.7, 0.3, 0), (0.2, 0.3, 0), (-0.3, 0.3, 0): the row without tokens stands with its reward.
    expected = torch.tensor([[0.7 - 1 / 3, 0.2 - 0.5 / 3, -0.3], [0.3 - 1 / 3, 0.3 - 0.5 / 3, 0.0]])
    torch.testing.assert_close(batch.advantage[:2], expected)
    assert (batch.advantage[2:] == 0).all()


def batches(trainer) -> list[hapo.TokenBatch]:
    return [RolloutRows.of(inputs).batch for inputs in trainer._buffered_inputs]


def test_lists_on_the_last_token_train_as_the_numbers_do(tmp_path):
    """Same losses and weights, bit for bit."""
    outcome = tiny.trainer(tmp_path / "a", method="grpo", beta=0.0)
    outcome.train()
    by_token = tiny.trainer(tmp_path / "b", reward=on_last, method="grpo", beta=0.0, method_options=BY_TOKEN)
    by_token.train()
    for a, b in zip(outcome.model.parameters(), by_token.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(batch.advantage.abs().max() > 0 for batch in batches(by_token))


@pytest.mark.parametrize("reward", [digit_by_digit, later], ids=["plain", "async"])
def test_each_token_learns_from_its_own(tmp_path, reward):
    trainer = tiny.trainer(
        tmp_path,
        reward=reward,
        method="hapo",
        method_options={**BY_TOKEN, "filter_groups": False},
        run_records=True,
    )
    trainer.train()
    for batch in batches(trainer):
        ids = torch.where(batch.mask, batch.token_reward, 0.0)
        torch.testing.assert_close(ids.sum(-1), batch.reward)
        assert set(batch.token_reward[batch.mask].tolist()) <= {1.0, -0.25}
        assert (batch.advantage.std(-1) > 0).any()
    table = pd.read_parquet(tmp_path / "tokens" / "step-000001-0.parquet")
    digit = table.id.between(2, 11)
    assert (table.token_reward == np.where(digit, 1.0, -0.25)).all()
    sums = table.groupby("response").token_reward.sum()
    np.testing.assert_allclose(sums, table.groupby("response").reward.first(), atol=1e-6)


def test_numbers_are_enough_for_a_method_of_token_rewards(tmp_path):
    trainer = tiny.trainer(tmp_path, method="dapo", method_options={**BY_TOKEN, "filter_groups": False})
    trainer.train()
    last = batches(trainer)[0]
    assert ((last.token_reward != 0).sum(-1) <= 1).all()
    assert last.advantage.abs().max() > 0


def test_sums_alone_are_said_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tiny.trainer(tmp_path, reward=digit_by_digit, method="grpo", beta=0.0, max_steps=8).train()
    said = [r.message for r in caplog.records if "per token" in r.message]
    assert said == [
        "'digit_by_digit' returned rewards per token, of which the method takes the sum: "
        'method_options={"advantage": "token_reward"} lets each token learn from its own. Said once'
    ]


def test_dynamic_sampling_moves_them_with_their_rows(tmp_path):
    trainer = tiny.trainer(
        tmp_path, reward=digit_by_digit, method="dapo", method_options=BY_TOKEN, max_num_gen_batches=3, max_steps=2
    )
    trainer.train()
    for batch in batches(trainer):
        torch.testing.assert_close(
            torch.where(batch.mask, batch.token_reward, 0.0).sum(-1)[batch.mask.any(-1)],
            batch.reward[batch.mask.any(-1)],
        )


REWARD = """
def by_place(prompts, completions, completion_ids, answer, **columns):
    return [[float(i % 2) for i in range(len(ids))] for ids in completion_ids]

def too_short(prompts, completions, completion_ids, **columns):
    return [[1.0] for _ in completion_ids]
"""


def test_hapo_train_takes_them_by_import_path(tmp_path):
    """The recipe's key `rewards`; the loss is the core's of the recorded tokens, held-out scores are the sums."""
    (tmp_path / "mine.py").write_text(REWARD)
    options = {**BY_TOKEN, "filter_groups": False}
    run = tmp_path / "run"
    flags = {"rewards": f"{tmp_path / 'mine.py'}:by_place", "max_steps": 2, "eval_size": 4}
    lines = train(run, "dapo", method_options=json.dumps(options), evaluate=True, **flags)
    table = pd.read_parquet(run / "tokens" / "step-000001-0.parquet")
    assert (table.token_reward == table.position % 2).all()
    batch = recorded(run, 1)
    core = hapo.method("dapo", **options)
    assert lines[0]["loss"] == pytest.approx(core.loss(one_step(core, batch)).loss.item(), abs=1e-6)
    assert lines[0]["grad_norm"] > 0
    held_out = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert all(score == int(score) >= 0 for score in held_out[0]["scores"])
    assert max(held_out[0]["scores"]) > 1


def test_hapo_train_names_a_wrong_length(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(REWARD)
    with pytest.raises(AssertionError):  # of the exit code
        train(tmp_path / "run", "dapo", rewards=f"{tmp_path / 'mine.py'}:too_short")
    assert "reward 'too_short' returned a list of 1 for a completion of" in capsys.readouterr().err
