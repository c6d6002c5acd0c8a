"""ASPO: worked example with both means, the six branches, the caps."""

import math

import pytest
import torch

import hapo
from hapo.parts.reduce import sequence_mean, token_mean
from tests.examples import close, example, logs, loss_and_grad, token_losses

T = torch.tensor
P_OLD = [[0.5, 0.4, 0.9, 0.3], [0.2, 0.5, 0.1]]
P = [[0.45, 0.6, 0.1, 0.33], [0.25, 0.3, 0.4]]


@pytest.mark.parametrize(
    ("reduce", "loss", "grad"),
    [
        (token_mean, 0.615138, [[-0.190476, 0.0, -0.514286, -0.155844], [0.142857, 0.0, 0.342857]]),
        (sequence_mean, 0.514950, [[-0.166667, 0.0, -0.450000, -0.136364], [0.166667, 0.0, 0.400000]]),
    ],
)
def test_aspo(reduce, loss, grad):
    batch = example(old=logs(P_OLD), new=logs(P), reward=[1.0, 0.0])
    method = hapo.method("aspo", kl_coef=0.0).replace(reduce=reduce)
    actual_loss, actual_grad, out = loss_and_grad(method, batch, advantage=T([[1.2] * 4, [-0.8] * 4]))
    assert actual_loss == pytest.approx(loss, abs=1e-6)
    close(actual_grad, grad)
    close(out.tokens["ratio"], [[0.9, 1.5, 0.111111, 1.1], [1.25, 0.6, 4.0]], batch.mask)
    close(
        token_losses(method, batch, out),
        [[-1.333333, -1.0, 8.289306, -1.090909], [1.0, 0.64, -2.199098]],
        batch.mask,
    )


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "grad"),
    [
        pytest.param(-0.8, 0.5, 0.8 * 0.8, 0.0, id="A < 0, below"),
        pytest.param(-0.8, 2.9, 0.8 * 2.9, 0.8 * 2.9, id="A < 0, inside"),
        pytest.param(-0.8, 3.1, 0.8 * 3 * math.log(3.1), 0.8 * 3, id="A < 0, capped"),
        pytest.param(1.2, 1.3, -1.2 / 1.2, 0.0, id="A > 0, above"),
        pytest.param(1.2, 0.4, -1.2 / 0.4, -1.2 / 0.4, id="A > 0, inside"),
        pytest.param(1.2, 0.3, -1.2 * 3 * math.log(0.3), -1.2 * 3, id="A > 0, capped"),
    ],
)
def test_aspo_branches(advantage, ratio, loss, grad):
    """Loss and gradient of one token, old log-prob 0."""
    batch = example(old=[[0.0]], new=[[math.log(ratio)]], reward=[1.0])
    actual, gradient, _ = loss_and_grad(hapo.method("aspo", kl_coef=0.0), batch, advantage=T([[advantage]]))
    assert actual == pytest.approx(loss, abs=1e-5)
    assert gradient.item() == pytest.approx(grad, abs=1e-5)


@pytest.mark.parametrize("advantage", [1.2, -0.8])
def test_aspo_gradient_is_capped_and_grpos_on_policy(advantage):
    new = (torch.arange(-500, 501) / 10).tolist()  # index 500 is on-policy
    batch = example(old=[[0.0] * 1001], new=[new], reward=[1.0])
    given = torch.full((1, 1001), advantage)
    _, grad, _ = loss_and_grad(hapo.method("aspo", kl_coef=0.0, c_pos=3.0, c_neg=2.0), batch, given)
    _, clipped, _ = loss_and_grad(hapo.method("grpo", kl_coef=0.0), batch, given)
    cap = abs(advantage) * (3.0 if advantage > 0 else 2.0)
    assert (grad * 1001).abs().max().item() == pytest.approx(cap, abs=1e-4)
    assert grad[0, 500] == clipped[0, 500] != 0
    outside = (T(new) > math.log(1.2)) if advantage > 0 else (T(new) < math.log(0.8))
    assert torch.equal(grad[0] == 0, outside)


def test_aspo_dual_clip_and_wider_bounds_of_uncertain_tokens():
    batch = example(
        old=logs([[0.1, 0.1, 0.1]]), new=logs([[0.4, 0.13, 0.13]]), entropy=[[0.1, 0.2, 0.9]], reward=[1.0]
    )
    _, grad, _ = loss_and_grad(hapo.method("aspo", kl_coef=0.0, dual_clip=3.0), batch, -torch.ones(1, 3))
    close(grad, [[0.0, 1.3 / 3, 1.3 / 3]])
    _, grad, out = loss_and_grad(
        hapo.method("aspo", kl_coef=0.0, eps_uncertain=0.4, rho=0.5), batch, torch.ones(1, 3)
    )
    close(grad, [[0.0, 0.0, -1 / 1.3 / 3]])
    close(out.tokens["low"], [[0.2, 0.2, 0.4]])
    close(out.tokens["high"], [[0.2, 0.2, 0.4]])


def test_aspo_without_caps():
    """A cap may be infinite: then the weight is 1/r, or r, alone."""
    batch = example(old=logs([[0.5, 0.5]]), new=logs([[0.05, 0.5]]), entropy=[[1.0, 1.0]], reward=[1.0])
    _, grad, _ = loss_and_grad(hapo.method("aspo", kl_coef=0.0, c_pos=math.inf), batch, torch.ones(1, 2))
    close(grad, [[-10 / 2, -1 / 2]], atol=1e-5)
