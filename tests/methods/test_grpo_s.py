"""GRPO-S: worked example in three modes, clipping of whole responses, relation to GRPO."""

import pytest
import torch

import hapo
from hapo.parts.entropy import mean_entropy
from hapo.parts.shaping import entropy_shaped_reward
from tests.examples import SHARES_H, close, loss_and_grad, on_tokens, shares_batch

CORRECT = torch.tensor([True, True, False, False])


@pytest.mark.parametrize(
    ("variant", "advantage", "loss", "grad"),
    [
        (
            "padded",
            [0.883429, 0.848442, -0.801981, -0.927782],
            -0.104598,
            [
                [-0.080981, -0.092024, -0.066257],
                [-0.106055, -0.148477],
                [0.060149, 0.046782, 0.073515],
                [0.208751],
            ],
        ),
        ("joint", [0.874461, 0.856972, -0.834236, -0.897197], -0.104352, [[-0.080159, -0.091090, -0.065585]]),
        ("own", [0.707062, -0.707062, 0.707094, -0.707094], 0.020623, []),
    ],
)
def test_grpo_s(variant, advantage, loss, grad):
    batch, method = shares_batch(), hapo.method("grpo_s", variant=variant)
    close(method.prepare(batch).advantage, on_tokens(advantage, SHARES_H))
    actual, gradient, out = loss_and_grad(method, batch)
    assert actual == pytest.approx(loss, abs=1e-6)
    if grad:
        close(gradient[: len(grad)], grad)
    close(out.tokens["ratio"], on_tokens([1.083333, 1.2, 0.9, 0.9], SHARES_H), batch.mask)


def test_grpo_s_shaped_rewards():
    batch = shares_batch()
    mean = mean_entropy(batch.old_entropy, batch.mask).unsqueeze(1)
    close(mean, [[0.5], [0.4], [0.583333], [0.25]])
    shaped = entropy_shaped_reward(mean, CORRECT, batch.group, batch.mask[:, :1])
    close(shaped, [[1.111111], [1.088889], [-1.060000], [-1.140000]])
    assert shaped[CORRECT].sum().item() == pytest.approx(2 * 1.1)
    assert shaped[~CORRECT].sum().item() == pytest.approx(-2 * 1.1)


def test_grpo_s_clips_a_whole_response_for_one_token():
    batch = shares_batch()
    logp = batch.logp.detach().clone()
    logp[0, 2] = batch.old_logp[0, 2] + 1
    _, grad, out = loss_and_grad(hapo.method("grpo_s"), batch.replace(logp=logp.requires_grad_()))
    assert out.tokens["clipped"][:, 0].tolist() == [True, False, False, False]
    assert (grad[0] == 0).all()
    active = out.tokens["advantage"] * out.tokens["ratio"] / 4
    torch.testing.assert_close(grad.sum(-1)[1:], -active[1:, 0])


def test_grpo_s_joint_with_equal_entropies_has_grpos_advantage():
    batch = shares_batch()
    batch = batch.replace(old_entropy=torch.full_like(batch.old_entropy, 0.3))
    advantage = hapo.method("grpo_s", variant="joint").prepare(batch).advantage
    expected = hapo.method("grpo").prepare(batch).advantage
    torch.testing.assert_close(advantage, expected, rtol=0, atol=2e-6)
