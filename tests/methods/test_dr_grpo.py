"""Dr. GRPO: worked example, equal weights, scale of rewards."""

import pytest
import torch

import hapo
from tests.examples import OLD, close, loss_and_grad, on_tokens, worked_batch


def test_dr_grpo():
    batch = worked_batch()
    method = hapo.method("dr_grpo", length_limit=8)
    close(method.prepare(batch).advantage, on_tokens([0.5, -0.5, -0.5, 0.5, 0.0, 0.0], OLD))
    loss, grad, _ = loss_and_grad(method, batch)
    assert loss == pytest.approx(-0.009516, abs=1e-6)
    close(
        grad,
        [
            [0.0, -0.008966, -0.010951, 0.0],
            [0.0, 0.011512],
            [0.010627, 0.0, 0.015540],
            [-0.010417, -0.008528],
            [0.0],
            [0.0],
        ],
    )


def test_dr_grpo_gives_every_token_the_same_weight():
    batch = worked_batch()
    batch = batch.replace(logp=batch.old_logp.clone().requires_grad_())
    _, grad, _ = loss_and_grad(hapo.method("dr_grpo", length_limit=8), batch)
    close(grad, on_tokens([-0.5 / 48, 0.5 / 48, 0.5 / 48, -0.5 / 48, 0.0, 0.0], OLD))


def test_dr_grpo_is_linear_in_the_reward_and_grpo_is_not():
    batch = worked_batch()
    gradients = {
        name: [
            loss_and_grad(hapo.method(name, kl_coef=0.0), batch.replace(reward=a * batch.reward))[1]
            for a in (1, 4)
        ]
        for name in ("dr_grpo", "grpo")
    }
    torch.testing.assert_close(gradients["dr_grpo"][1], 4 * gradients["dr_grpo"][0])
    torch.testing.assert_close(gradients["grpo"][1], gradients["grpo"][0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("right", [1, 3])
def test_dr_grpo_advantage_of_a_binary_group(right):
    reward = torch.tensor([1.0] * right + [0.0] * (4 - right) + [0.0, 1.0])
    advantage = hapo.method("dr_grpo").prepare(worked_batch(reward=reward)).advantage[:4, 0]
    p = right / 4
    assert advantage.tolist() == [1 - p] * right + [-p] * (4 - right)
