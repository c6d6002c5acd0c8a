"""SAPO: worked examples by hand and with the paper's temperatures, the gate far from ratio 1, ranges."""

import math

import pytest
import torch

import hapo
from hapo.parts.surrogate import soft_gate
from tests.examples import close, example, loss_and_grad, token_losses, worked_batch

T = torch.tensor


def test_sapo_by_hand():
    # A = ±0.707106, and 0 in the group of one, which counts in S = 3.
    # With tau_pos = ln 3, tau_neg = ln 4: sigmoid = 3/4, 1/2 where A > 0; 2/3, 1/3 where A < 0.
    old, ratio = [[-2.0, -2.0], [-2.0, -2.0], [-2.0]], [[2.0, 1.0], [1.5, 0.5], [3.0]]
    new = [[o + math.log(r) for o, r in zip(x, y, strict=True)] for x, y in zip(old, ratio, strict=True)]
    batch = example(old=old, new=new, reward=[1.0, 0.0, 1.0], group=[0, 0, 1])
    loss, grad, out = loss_and_grad(hapo.method("sapo", tau_pos=math.log(3), tau_neg=math.log(4)), batch)
    assert loss == pytest.approx(-0.196317, abs=1e-6)  # A / 3 (2 / ln 4 - 2.5 / ln 3)
    # -A r 4 p (1 - p) / 6: r 4 p (1 - p) = 3/2, 1 and 4/3, 4/9
    close(grad, [[-0.176776, -0.117851], [0.157135, 0.052378], [0.0]])
    assert not out.tokens["clipped"].any()


def test_sapo():
    """The defaults; figures from the formula in plain Python."""
    batch, method = worked_batch(), hapo.method("sapo")
    loss, grad, out = loss_and_grad(method, batch)
    assert loss == pytest.approx(-0.031619, abs=1e-6)
    close(
        token_losses(method, batch, out),
        [
            [-1.923008, -1.611612, -1.776440, -2.089751],
            [1.426487, 1.740557],
            [1.667064, 1.458862, 2.066281],
            [-1.732048, -1.575493],
            [0.0],
            [0.0],
        ],
        batch.mask,
    )
    close(
        grad,
        [
            [-0.043538, -0.030908, -0.037909, -0.049022],
            [0.052486, 0.079516],
            [0.049079, 0.036969, 0.067195],
            [-0.072169, -0.058604],
            [0.0],
            [0.0],
        ],
    )


def test_the_gate_at_one_far_away_and_without_an_advantage():
    """Gradient -A at ratio 1 whatever tau is; 0 where float32 has no more digits; 0 where A = 0."""
    ratio = T([[1.0, 1.0, math.exp(20), math.exp(-20), 3.0]])
    logp = ratio.log().requires_grad_()
    r = ratio * (logp - logp.detach()).exp()
    out = soft_gate(r, T([[2.0, -3.0, 1.0, -1.0, 0.0]]), tau_pos=0.5, tau_neg=7.0)
    (grad,) = torch.autograd.grad(out.loss.sum(), logp)
    assert grad.tolist() == [[-2.0, 3.0, 0.0, pytest.approx(0.0, abs=1e-8), 0.0]]
    # f(1) = 2 / tau; the gate never exceeds 4 / tau.
    assert out.loss[0].tolist() == pytest.approx([-8.0, 6 / 7, -8.0, 4 / 7 / (1 + math.exp(7)), 0.0])


@pytest.mark.parametrize("name", ["tau_pos", "tau_neg"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf])
def test_a_temperature_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be > 0 and finite, got {value}"):
        hapo.method("sapo", **{name: value})
