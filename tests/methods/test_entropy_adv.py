"""Entropy-Adv: worked example, range of the shaped advantage."""

import pytest
import torch

import hapo
from hapo.parts.shaping import entropy_bonus
from tests.examples import OLD, close, loss_and_grad, on_tokens, worked_batch


def test_entropy_adv():
    batch, method = worked_batch(), hapo.method("entropy_adv", alpha=0.4, kappa=2.0)
    prepared = method.prepare(batch)
    close(prepared.advantage, on_tokens([0.866024, -0.866024, -0.866024, 0.866024, 0.0, 0.0], OLD))
    loss, grad, out = loss_and_grad(method, batch)
    assert loss == pytest.approx(-0.177454, abs=1e-6)
    close(
        out.tokens["advantage"] - prepared.advantage,
        [
            [0.433012, 0.020000, 0.240000, 0.008000],
            [0.360000, 0.120000],
            [0.004000, 0.433012, 0.160000],
            [0.060000, 0.100000],
            [0.0],
            [0.0],
        ],
    )
    close(
        out.tokens["advantage"],
        [
            [1.299036, 0.886024, 1.106024, 0.874024],
            [-0.506024, -0.746024],
            [-0.862024, -0.433012, -0.706024],
            [0.926024, 0.966024],
            [0.0],
            [0.0],
        ],
    )
    close(
        grad,
        [
            [-0.099165, -0.047663, -0.072671, 0.0],
            [0.0, 0.051530],
            [0.054965, 0.0, 0.065829],
            [-0.057876, -0.049432],
            [0.0],
            [0.0],
        ],
    )


def test_entropy_adv_bonus_is_capped_and_floored():
    """A bonus of nothing at H <= 0, of alpha H, of |A| / kappa; none where A = 0."""
    advantage = torch.tensor([[2.0] * 4, [-2.0] * 4, [0.0] * 4])
    entropy = torch.tensor([[-1e-3, 0.0, 0.5, 99.0]]).expand(3, 4)
    expected = [[2.0, 2.0, 2.2, 3.0], [-2.0, -2.0, -1.8, -1.0], [0.0] * 4]
    close(entropy_bonus(advantage, entropy, alpha=0.4, kappa=2.0), expected)


def test_entropy_adv_without_weight_is_grpo_on_a_dapo_recipe():
    loss, grad, _ = loss_and_grad(hapo.method("entropy_adv", alpha=0.0), worked_batch())
    dapo_loss, dapo_grad, _ = loss_and_grad(hapo.method("dapo", filter_groups=False), worked_batch())
    assert loss == dapo_loss
    assert torch.equal(grad, dapo_grad)


def test_entropy_adv_shapes_the_prepared_advantage_once():
    """Several epochs on one prepared batch see the same A'."""
    method = hapo.method("entropy_adv")
    prepared = method.prepare(worked_batch())
    first, second = (method.loss(prepared).tokens["advantage"] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, prepared.advantage)
