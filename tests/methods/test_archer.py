"""Archer: worked example in the paper's and the release's form, borders of the gate."""

import pytest
import torch

import hapo
from hapo.parts.entropy import masked_quantile
from hapo.parts.reduce import token_mean
from tests.examples import OLD, close, example, loss_and_grad, on_tokens, worked_batch

GATE = [[1, 0, 0, 0], [1, 0], [0, 1, 0], [0, 1], [1, 0, 0], [0, 1]]
NO_KL = {"kl_coef": 0.0, "kl_reasoning": 0.0}


def test_archer():
    batch, method = worked_batch(), hapo.method("archer")
    close(method.prepare(batch).advantage, on_tokens([0.866024, -0.866024, -0.866024, 0.866024, 0.0, 0.0], OLD))
    tau = masked_quantile(batch.entropy, batch.mask, 0.8)
    close(tau, [[0.84], [0.78], [1.36], [0.23], [0.452], [1.3]])
    loss, grad, out = loss_and_grad(method, batch)
    close(out.tokens["signal"], GATE)
    for side in ("low", "high"):
        close(out.tokens[side], [[0.5 if gated else 0.2 for gated in row] for row in GATE], batch.mask)
    assert loss == pytest.approx(-0.054937, abs=1e-6)
    close(
        grad,
        [
            [-0.066110, -0.046597, -0.056896, 0.000016],
            [0.040098, 0.059830],
            [0.055221, 0.042154, 0.080775],
            [-0.054130, -0.044315],
            [0.0, -0.000005, 0.000002],
            [0.000018, 0.0],
        ],
    )


@pytest.mark.parametrize(
    ("variant", "loss", "penalty"), [("paper", -0.054937, 0.00001776), ("release", -0.054926, 0.00002841)]
)
def test_archer_policy_and_kl_parts(variant, loss, penalty):
    """In float64, to the eight decimals of the penalty."""
    batch = worked_batch(dtype=torch.float64)
    both, *_ = loss_and_grad(hapo.method("archer", variant=variant), batch)
    policy, *_ = loss_and_grad(hapo.method("archer", variant=variant, **NO_KL), batch)
    assert both == pytest.approx(loss, abs=1e-6)
    assert policy == pytest.approx(-0.054954, abs=1e-6)
    assert both - policy == pytest.approx(penalty, abs=1e-8)


def test_archer_gate_on_ties():
    """A response of one token, and one of equal entropies: all gated in the paper, none in the release."""
    batch = example(
        old=[[-1.0], [-1.0] * 3],
        new=[[-1.3], [-1.3] * 3],
        ref=[[-2.0], [-2.0] * 3],
        entropy=[[0.7], [0.2] * 3],
        reward=[1.0, 0.0],
    )
    for variant, gated in (("paper", 1.0), ("release", 0.0)):
        _, _, out = loss_and_grad(hapo.method("archer", variant=variant), batch)
        close(out.tokens["signal"], on_tokens([gated] * 2, [[0.7], [0.2] * 3]))
        assert out.tokens["clipped"].tolist() == [[False] * 3, [not gated] * 3]


def test_archer_gate_holds_the_order_statistic_where_the_quantile_is_one():
    """0.28 (26 - 1) is 7.000000000000001 in floating point: the eighth token must not fall below it."""
    one = [[-1.0] * 26]
    batch = example(old=one, new=one, ref=one, entropy=[[t / 26 for t in range(26)]], reward=[1.0])
    _, _, out = loss_and_grad(hapo.method("archer", rho=0.28), batch)
    close(out.tokens["signal"], [[0.0] * 7 + [1.0] * 19])


def test_archer_with_one_width_and_no_kl_is_grpo_with_a_token_mean():
    archer = hapo.method("archer", eps_knowledge=0.2, eps_reasoning=0.2, **NO_KL)
    loss, grad, _ = loss_and_grad(archer, worked_batch())
    grpo = hapo.method("grpo", kl_coef=0.0).replace(reduce=token_mean)
    grpo_loss, grpo_grad, _ = loss_and_grad(grpo, worked_batch())
    assert loss == grpo_loss
    assert torch.equal(grad, grpo_grad)
