"""GRPO: worked example."""

import pytest
import torch

import hapo
from hapo.parts.penalty import k3
from hapo.parts.reduce import token_mean
from tests.examples import NEW, OLD, REF, close, loss_and_grad, on_tokens, padded, token_losses, worked_batch


def test_grpo():
    batch = worked_batch()
    method = hapo.method("grpo", eps_low=0.2, eps_high=0.2, kl_coef=0.04)
    advantage = [0.866024, -0.866024, -0.866024, 0.866024, 0.0, 0.0]
    close(method.prepare(batch).advantage, on_tokens(advantage, OLD))
    loss, grad, out = loss_and_grad(method, batch)
    assert loss == pytest.approx(0.012374, abs=1e-6)
    close(
        grad,
        [
            [0.000159, -0.031328, -0.037776, 0.000432],
            [-0.002162, 0.080363],
            [0.049128, -0.001629, 0.072778],
            [-0.072340, -0.060253],
            [0.000211, -0.000161, 0.000066],
            [0.000984, -0.002444],
        ],
    )
    close(
        out.tokens["ratio"],
        [
            [1.221403, 0.860708, 1.051271, 1.419068],
            [0.740818, 1.105171],
            [1.020201, 0.778801, 1.491825],
            [1.000000, 0.818731],
            [1.105171, 0.951229, 1.000000],
            [1.284025, 0.670320],
        ],
        batch.mask,
    )
    close(
        token_losses(method, batch, out),
        [
            [-1.039229, -0.745394, -0.910426, -1.039229],
            [0.692819, 0.957104],
            [0.883519, 0.692819, 1.291956],
            [-0.866024, -0.709040],
            [0.0],
            [0.0],
        ],
        batch.mask,
    )


def test_grpo_penalty():
    batch = worked_batch(dtype=torch.float64)
    close(
        k3(padded(NEW), padded(REF)),
        [
            [0.004837, 0.011834, 0.004837, 0.040818],
            [0.148721, 0.018731],
            [0.000199, 0.183253, 0.148812],
            [0.001271, 0.049859],
            [0.004837, 0.002508, 0.000446],
            [0.054688, 0.183253],
        ],
        batch.mask,
    )
    loss, *_ = loss_and_grad(hapo.method("grpo", kl_coef=0.04), batch)
    policy, *_ = loss_and_grad(hapo.method("grpo", kl_coef=0.0), batch)
    assert policy == pytest.approx(0.009993, abs=1e-6)
    assert (loss - policy) / 0.04 == pytest.approx(0.059532, abs=1e-6)


def test_grpo_weighs_responses_not_tokens():
    """Every response has the same total weight on-policy: |d loss / d logp| sums to |A| / S."""
    batch = worked_batch()
    batch = batch.replace(logp=batch.old_logp.clone().requires_grad_())
    _, grad, _ = loss_and_grad(hapo.method("grpo", kl_coef=0.0), batch)
    close(
        grad.sum(-1, keepdim=True),
        [[-0.866024 / 6], [0.866024 / 6], [0.866024 / 6], [-0.866024 / 6], [0.0], [0.0]],
    )


def test_grpo_on_a_dapo_recipe():
    """Token mean and clip-higher make GRPO's advantage DAPO's loss on the same rows."""
    grpo = hapo.method("grpo", kl_coef=0.0, eps_high=0.28, filter_groups=True).replace(reduce=token_mean)
    loss, grad, _ = loss_and_grad(grpo, worked_batch())
    dapo_loss, dapo_grad, _ = loss_and_grad(hapo.method("dapo"), worked_batch())
    assert loss == dapo_loss
    assert torch.equal(grad, dapo_grad)
