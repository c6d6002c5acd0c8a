"""Credit per turn."""

import math

import pytest
import torch
from hypothesis import given, settings

import hapo
from hapo.parts.credit import last_token
from hapo.parts.turns import turn_advantage, turn_index, turn_returns
from tests.examples import one_step
from tests.test_laws import batches

MASK = torch.tensor(
    [
        [1, 1, 0, 0, 1, 0, 1, 1],  # three turns
        [1, 1, 1, 0, 1, 1, 0, 0],  # two
        [1, 0, 0, 0, 0, 0, 0, 0],  # one
        [0, 0, 0, 0, 0, 0, 0, 0],  # none: cut off
    ]
).bool()
REWARD = torch.zeros(MASK.shape)
for row, place, value in ((0, 1, -1.0), (0, 4, -1.0), (0, 7, 0.5), (1, 2, -1.0), (1, 5, 0.75), (2, 0, 1.0)):
    REWARD[row, place] = value
OUTCOME = torch.tensor([0.5, 0.75, 1.0, -1.0])
GROUP = torch.zeros(4, dtype=torch.long)
TURN = torch.where(MASK, turn_index(MASK), 77)


def test_a_turn_is_a_run_of_valid_tokens():
    assert turn_index(MASK).tolist() == [
        [0, 0, 0, 0, 1, 1, 2, 2],
        [0, 0, 0, 0, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_returns_go_over_turns():
    garbage = torch.where(MASK, REWARD, torch.nan)
    last = turn_returns(garbage, OUTCOME, MASK, TURN, 0.9)
    assert last[:, :3].tolist() == [
        pytest.approx([-1 + 0.9 * (-1 + 0.9 * 0.5), -1 + 0.9 * 0.5, 0.5]),
        pytest.approx([-1 + 0.9 * 0.75, 0.75, 0.75]),
        pytest.approx([1, 1, 1]),
        pytest.approx([-1, -1, -1]),
    ]
    out = turn_returns(garbage, OUTCOME, MASK, TURN, 0.9, "out")
    assert out[1:3, 2].isnan().all() and out[2, 1].isnan()


def test_each_turn_has_a_baseline_of_its_own():
    """GRPO's z-scores by hand: turn 0 of four episodes, turn 1 of the first two (the last, without tokens, stands
    everywhere), each on all tokens of its turn."""
    returns = turn_returns(REWARD, OUTCOME, MASK, TURN, 1.0, "out")
    advantage = turn_advantage(returns, GROUP, MASK, TURN)
    for turn, values in enumerate(([-1.5, -0.25, 1.0, -1.0], [-0.5, 0.75, -1.0], [0.5, -1.0])):
        x = torch.tensor(values, dtype=torch.float64)
        z = (x - x.mean()) / (x.std() + 1e-6)
        for row in range(len(values) - 1):
            mine = MASK[row] & (turn_index(MASK)[row] == turn)
            assert advantage[row][mine].tolist() == pytest.approx([float(z[row])] * int(mine.sum()), abs=1e-6)
    assert (advantage[~MASK] == 0).all()


def test_turns_of_other_lengths_change_nothing():
    """What counts is the number of a turn, not the place of its tokens."""
    longer = torch.cat([MASK[:, :1], MASK], 1)
    rewards = torch.cat([torch.zeros(4, 1), REWARD], 1)
    narrow = turn_advantage(turn_returns(REWARD, OUTCOME, MASK, TURN), GROUP, MASK, TURN)
    turn = turn_index(longer)
    wide = turn_advantage(turn_returns(rewards, OUTCOME, longer, turn), GROUP, longer, turn)
    assert torch.equal(wide[:, 1:], narrow)


@settings(max_examples=20)
@given(batch=batches())
def test_rewards_of_last_turns_alone_are_the_outcome(batch):
    on_last = torch.where(last_token(batch.mask), batch.reward.unsqueeze(1), 0.0)
    for name in ("grpo", "gmpo"):
        outcome = one_step(hapo.method(name), batch)
        by_turn = one_step(hapo.method(name, advantage="turn_reward"), batch.replace(token_reward=on_last))
        assert torch.equal(outcome.advantage, by_turn.advantage)


def test_one_turn_is_the_outcome_whatever_its_tokens_earn():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    rewards = torch.tensor([[0.5, 0.0, 0.25, math.nan], [0.0, 1.5, math.nan, math.nan]])
    turn = torch.tensor([[0, 0, 0, -9], [0, 0, 99, 99]])
    returns = turn_returns(rewards, torch.tensor([0.75, 1.5]), mask, turn)
    advantage = turn_advantage(returns, torch.zeros(2).long(), mask, turn)
    assert advantage[0, :3].tolist() == pytest.approx([-(0.5**0.5)] * 3, abs=1e-5)


def test_turns_with_nothing_between_them_have_numbers():
    """Without numbers they are one turn; what is not below T, or not above -1, is refused."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    flat = torch.zeros(2, 3)
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.5, 0.0]])
    batch = hapo.TokenBatch(
        mask=mask, old_logp=flat, old_entropy=flat, reward=rewards.sum(1), token_reward=rewards, group=GROUP[:2]
    )
    method = hapo.method("dr_grpo", advantage="turn_reward")
    one = method.prepare(batch).advantage
    assert one.tolist() == [[0.25] * 3, [-0.25] * 3]
    numbered = batch.replace(turn=torch.tensor([[0, 1, 1], [0, 0, 1]]))
    assert method.prepare(numbered).advantage.tolist() == [[0.25, 0.5, 0.5], [-0.25, -0.25, -0.5]]
    for wrong in (-1, 3):
        with pytest.raises(
            ValueError, match=r"turn holds numbers from -?\d to -?\d: they begin at 0, and a row of 3"
        ):
            method.prepare(batch.replace(turn=torch.full((2, 3), wrong)))


def test_methods_of_another_advantage_refuse_it():
    for name in ("hapo", "rloo", "gtpo"):
        with pytest.raises(
            ValueError, match="advantage must be one of 'outcome', 'token_reward', got 'turn_reward'"
        ):
            hapo.method(name, advantage="turn_reward")
    with pytest.raises(ValueError, match="'token_reward', 'turn_reward', got 'turns'"):
        hapo.method("grpo", advantage="turns")
