"""EGSPO: worked examples with both attenuations, the gate, its ties, and what its weights do to the gradient."""

import math

import pytest
import torch

import hapo
from hapo.parts.select import largest_share
from tests.examples import close, example, loss_and_grad, one_step, worked_batch

VARIANTS = [
    ("egspo", {"attenuation": "const", "rho": 0.5, "kl_coef": 0.01, "dual_clip": 3.0}),
    ("egspo", {"tau": 1.0, "filter_groups": True}),
]
PLAIN = ("dapo", {"filter_groups": False, "eps_high": 0.2})
LIMITS = [
    (("egspo", {"rho": 1.0}), PLAIN),
    (("egspo", {"tau": 0.0}), PLAIN),
    (("egspo", {"attenuation": "const", "phi_const": 1.0}), PLAIN),
]

A = [[0.8, 0.8, 0.8], [-0.8, -0.8]]
NEW = [[-0.10, -1.20, -0.30], [-0.05, -2.00]]
OLD = [[-0.40, -1.00, -0.35], [-0.06, -1.70]]
H = [[0.20, 1.50, 0.60], [0.10, 1.10]]
GATE = [[0, 1, 0], [0, 1]]
PHI = [[0.086107, 1.0, 0.192007], [0.046392, 1.0]]


def spec_batch() -> hapo.TokenBatch:
    return example(old=OLD, new=NEW, entropy=H, reward=[1.0, 0.0])


def advantages() -> torch.Tensor:
    return torch.tensor([[0.8] * 3, [-0.8, -0.8, 0.0]])


@pytest.mark.parametrize(
    ("options", "loss", "grad"),
    [
        ({"rho": 0.4}, -0.044328, [[0.0, -0.130997, -0.032296], [0.007497, 0.0]]),
        ({"tau": 1.10}, -0.044328, [[0.0, -0.130997, -0.032296], [0.007497, 0.0]]),
        ({"rho": 0.4, "attenuation": "const"}, -0.022856, [[0.0, -0.130997, -0.016820], [0.016161, 0.0]]),
        ({"rho": 1.0}, -0.201592, [[0.0, -0.130997, -0.168203], [0.161608, 0.0]]),
    ],
)
def test_egspo(options, loss, grad):
    value, gradient, out = loss_and_grad(hapo.method("egspo", **options), spec_batch(), advantages())
    assert value == pytest.approx(loss, abs=1e-6)
    close(gradient, grad)
    assert out.tokens["clipped"].nonzero().tolist() == [[0, 0], [1, 1]]
    if options.get("rho") != 1.0:
        close(out.tokens["signal"], GATE)


def test_weights_of_the_worked_example():
    _, _, out = loss_and_grad(hapo.method("egspo", rho=0.4), spec_batch(), advantages())
    close(out.tokens["advantage"] / advantages().where(spec_batch().mask, 1.0), PHI)


def test_with_chord_phi_beside_it_is_the_worked_example_of_hybrid_training():
    """0.9 x -0.044328 + 0.1 x 0.134369, the latter of one expert row."""
    rollouts = loss_and_grad(hapo.method("egspo", rho=0.4), spec_batch(), advantages())[0]
    logp = torch.tensor([[-0.10, -1.20, -3.00]], requires_grad=True)
    out = hapo.method("chord_phi").loss(hapo.TokenBatch(mask=torch.ones(1, 3, dtype=torch.bool), logp=logp))
    close(torch.autograd.grad(out.loss, logp)[0], [[-0.028702, -0.070159, -0.015769]])
    assert 0.9 * rollouts + 0.1 * out.loss.item() == pytest.approx(-0.026459, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"attenuation": "const", "phi_const": 0.3}])
def test_certain_tokens_have_phi_times_the_plain_gradient_and_the_others_the_plain_one(options):
    """Both in its sign: wrong responses are pushed down at certain tokens too."""
    batch = worked_batch()
    _, plain, _ = loss_and_grad(hapo.method(PLAIN[0], **PLAIN[1]), batch)
    _, grad, out = loss_and_grad(hapo.method("egspo", **options), batch)
    p = batch.logp.detach().exp()
    phi = torch.full_like(p, 0.3) if options else p * (1 - p)
    gate = out.tokens["signal"] > 0
    expected = torch.where(batch.mask, torch.where(gate, plain, phi * plain), 0.0)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-9)
    certain_and_wrong = batch.mask & ~gate & (batch.reward == 0).unsqueeze(1) & (plain > 0)
    assert certain_and_wrong.any() and (grad[certain_and_wrong] > 0).all()
    assert torch.equal(grad.sign(), torch.where(batch.mask, plain, 0.0).sign())


def test_phi_is_a_constant_for_autograd():
    """On-policy the gradient is -w A / N alone, without the (1 - 2p) of a phi that is differentiated."""
    batch = worked_batch()
    logp = batch.old_logp.masked_fill(~batch.mask, 0.0).requires_grad_()
    method = hapo.method("egspo")
    prepared = one_step(method, batch.replace(logp=logp))
    (grad,) = torch.autograd.grad(method.loss(prepared).loss, logp)
    p = logp.detach().exp()
    w = torch.where(prepared.signal > 0, 1.0, p * (1 - p))
    n = batch.mask.sum()
    torch.testing.assert_close(grad, torch.where(batch.mask, -w * prepared.advantage / n, 0.0))


@pytest.mark.parametrize("rho", [0.01, 0.2, 0.29, 0.5, 0.999, 1.0])
def test_the_number_of_tokens_in_full_is_exact(rho):
    g = torch.Generator().manual_seed(0)
    for n in (1, 7, 100):
        mask = torch.zeros(10, 12, dtype=torch.bool)
        mask.view(-1)[torch.randperm(120, generator=g)[:n]] = True
        entropy = torch.where(mask, torch.rand(10, 12, generator=g), 99.0)  # padding is never chosen
        for ties in ("all", "first"):
            gate = largest_share(entropy, mask, rho, ties)
            assert gate.sum() == max(1, math.floor(round(rho * n, 6)))
            assert not gate[~mask].any()
            others = entropy[mask & (gate == 0)]
            assert (entropy[gate > 0].min() > others).all()


def test_ties():
    entropy, mask = torch.tensor([[0.5, 1.0, 0.5], [0.5, 0.5, 9.0]]), torch.ones(2, 3, dtype=torch.bool)
    mask[1, 2] = False
    assert largest_share(entropy, mask, 0.6, "first").tolist() == [[1, 1, 1], [0, 0, 0]]
    assert largest_share(entropy, mask, 0.6).tolist() == [[1, 1, 1], [1, 1, 0]]
    assert largest_share(entropy, ~mask & False, 0.6).tolist() == [[0] * 3] * 2


def test_the_share_knows_the_order_of_entropies_alone():
    """And neither the current policy's entropies nor a second pass over the rollout batch moves the gate."""
    batch, method = worked_batch(), hapo.method("egspo")
    scaled = batch.replace(old_entropy=batch.old_entropy * 3.7, entropy=batch.entropy * 0 + 1)
    for one, other in zip(loss_and_grad(method, batch)[:2], loss_and_grad(method, scaled)[:2], strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    prepared = method.prepare(batch)
    halves = torch.cat([method.step(prepared.rows(rows)).signal for rows in (slice(0, 2), slice(2, None))])
    assert torch.equal(halves, prepared.signal)


def test_a_constant_of_0_silences_certain_tokens():
    _, grad, out = loss_and_grad(hapo.method("egspo", rho=0.5, attenuation="const", phi_const=0.0), worked_batch())
    assert (grad[out.tokens["signal"] == 0] == 0).all() and (grad != 0).any()
