"""CE-GPPO: worked example in three modes, the gradients that the bound leaves."""

import math

import pytest
import torch

import hapo
from hapo.parts.reduce import token_mean
from tests.examples import close, example, logs, loss_and_grad, token_losses

P_OLD = [[0.5, 0.4, 0.3], [0.2, 0.5, 0.05, 0.6]]
P = [[0.45, 0.6, 0.15], [0.25, 0.3, 0.6, 0.6]]
ADVANTAGE = torch.tensor([[1.5] * 4, [-0.5] * 4])


@pytest.mark.parametrize(
    ("options", "loss", "changed_losses", "changed_grads"),
    [
        ({}, 0.489286, {}, {}),
        ({"dual_clip": 10.0}, 0.346429, {(1, 2): 5.0}, {(1, 2): 0.0}),
        ({"beta1": 0.0, "beta2": 0.0}, 0.717857, {(0, 1): 0.0, (1, 1): 0.0}, {(0, 1): 0.0, (1, 1): 0.0}),
    ],
    ids=["plain", "dual clip", "no betas"],
)
def test_ce_gppo(options, loss, changed_losses, changed_grads):
    batch = example(old=logs(P_OLD), new=logs(P), reward=[1.0, 0.0], dtype=torch.float64)  # for a ratio of 12
    method = hapo.method("ce_gppo", **options)
    losses = [[-1.35, -1.8, -0.75], [0.625, 0.2, 6.0, 0.5]]
    grads = [[-0.192857, -0.257143, -0.107143], [0.089286, 0.028571, 0.857143, 0.071429]]
    for expected, changes in ((losses, changed_losses), (grads, changed_grads)):
        for (i, t), value in changes.items():
            expected[i][t] = value
    actual, grad, out = loss_and_grad(method, batch, ADVANTAGE)
    assert actual == pytest.approx(loss, abs=1e-6)
    close(grad, grads)
    close(out.tokens["ratio"], [[0.9, 1.5, 0.5], [1.25, 0.6, 12.0, 1.0]], batch.mask)
    close(token_losses(method, batch, out), losses, batch.mask)


def test_ce_gppo_without_betas_has_the_gradient_of_the_clipped_surrogate():
    batch = example(old=logs(P_OLD), new=logs(P), reward=[1.0, 0.0])
    _, grad, _ = loss_and_grad(hapo.method("ce_gppo", beta1=0.0, beta2=0.0), batch, ADVANTAGE)
    clipped = hapo.method("grpo", kl_coef=0.0).replace(reduce=token_mean)
    loss, expected, _ = loss_and_grad(clipped, batch, ADVANTAGE)
    assert loss == pytest.approx(0.517857, abs=1e-6)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("advantage", "ratios", "grads"),
    [
        pytest.param(-2.0, [0.01, 0.3, 0.79], [0.5 * 0.8 * 2] * 3, id="low"),
        pytest.param(2.0, [1.21, 3.0, 900.0], [-1.5 * 1.2 * 2] * 3, id="high"),
        pytest.param(2.0, [0.01, 0.3, 0.79], [-0.02, -0.6, -1.58], id="below, A > 0"),
        pytest.param(-2.0, [1.21, 3.0, 9.0], [2.42, 6.0, 18.0], id="above, A < 0"),
        pytest.param(0.0, [0.5, 1.0, 2.0], [0.0] * 3, id="A = 0"),
    ],
)
def test_ce_gppo_keeps_the_gradient_of_the_bound_whatever_the_ratio(advantage, ratios, grads):
    batch = example(old=[[0.0] * 3], new=[[math.log(r) for r in ratios]], reward=[1.0])
    method = hapo.method("ce_gppo", beta1=0.5, beta2=1.5)
    _, grad, out = loss_and_grad(method, batch, torch.full((1, 3), advantage))
    close(3 * grad, [grads], atol=1e-5)
    close(token_losses(method, batch, out), [grads], atol=1e-5)
