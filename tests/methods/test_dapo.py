"""DAPO: worked example, length penalty, dynamic sampling."""

import pytest
import torch

import hapo
from hapo.parts.shaping import soft_overlong_punishment
from tests.examples import GROUP, OLD, REWARD, close, loss_and_grad, on_tokens, worked_batch


def test_dapo():
    batch = worked_batch()
    method = hapo.method("dapo", eps_low=0.2, eps_high=0.28)
    prepared = method.prepare(batch)
    assert prepared.totals == hapo.StepTotals(sequences=4, tokens=11, kept=11)
    close(prepared.advantage, on_tokens([0.866024, -0.866024, -0.866024, 0.866024, 0.0, 0.0], OLD))
    loss, grad, _ = loss_and_grad(method, batch)
    assert loss == pytest.approx(-0.079904, abs=1e-6)
    close(
        grad,
        [
            [-0.096160, -0.067763, -0.082766, 0.0],
            [0.0, 0.087009],
            [0.080320, 0.0, 0.117451],
            [-0.078729, -0.064458],
            [0.0],
            [0.0],
        ],
    )


def test_dapo_overlong_punishment():
    length = torch.tensor([10000, 16384, 17000, 20480, 20481])
    expected = torch.tensor([0.0, 0.0, -0.150391, -1.0, -1.0])
    torch.testing.assert_close(soft_overlong_punishment(length, 20480, 4096), expected, rtol=0, atol=1e-6)
    shaped = torch.tensor([1.0, -1, -1, 1]) + soft_overlong_punishment(torch.tensor([4, 2, 3, 2]), 4, 2)
    torch.testing.assert_close(shaped, torch.tensor([0.0, -1.0, -1.5, 1.0]))
    batch = worked_batch(reward=torch.cat([shaped, REWARD[4:]]))
    advantage = hapo.method("dapo").prepare(batch).advantage
    close(advantage[:4], on_tokens([0.338240, -0.563734, -1.014721, 1.240215], OLD[:4]))


def test_dapo_filters_on_the_verdict_not_on_the_shaped_reward():
    shaped = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.5])  # group 1: all correct, one too long
    prepared = hapo.method("dapo").prepare(worked_batch(reward=shaped, verdict=REWARD))
    assert not prepared.mask[GROUP == 1].any()
    assert hapo.method("dapo").prepare(worked_batch(reward=shaped)).mask[GROUP == 1].any()


def test_dapo_clip_higher_moves_only_positive_tokens_above_the_old_bound():
    _, narrow, out = loss_and_grad(hapo.method("dapo", eps_high=0.2), worked_batch())
    _, wide, _ = loss_and_grad(hapo.method("dapo", eps_high=0.5), worked_batch())
    raised = (out.tokens["advantage"] > 0) & (out.tokens["ratio"] > 1.2)
    assert raised.sum() == 2
    assert torch.equal(narrow != wide, raised)
