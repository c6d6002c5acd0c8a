"""DAPO on forking tokens: worked example with both normalisers, the choice of tokens."""

import pytest
import torch

import hapo
from hapo.parts.penalty import k3
from hapo.parts.reduce import token_mean, valid_token_mean
from hapo.parts.select import most_uncertain
from tests.examples import ENTROPY, OLD, close, loss_and_grad, on_tokens, one_step, padded, worked_batch


@pytest.mark.parametrize(
    ("reduce", "loss", "grad"),
    [(token_mean, 0.081969, -0.264441), (valid_token_mean, 0.020492, -0.264441 * 4 / 16)],
)
def test_forking_tokens(reduce, loss, grad):
    batch = worked_batch()
    method = hapo.method("forking_tokens", rho=0.2, filter_groups=False).replace(reduce=reduce)
    prepared = one_step(method, batch)
    close(prepared.keep, [[1, 0, 0, 0], [1, 0], [0, 1, 0], [0, 0], [0, 0, 0], [0, 1]])
    assert batch.entropy[prepared.keep].min().item() == pytest.approx(0.9, abs=1e-6)
    assert prepared.totals == hapo.StepTotals(sequences=6, tokens=16, kept=4)
    close(prepared.advantage, on_tokens([0.866024, -0.866024, -0.866024, 0.866024, 0.0, 0.0], OLD))
    actual, gradient, _ = loss_and_grad(method, batch)
    assert actual == pytest.approx(loss, abs=1e-6)
    close(gradient, [[grad, 0.0, 0.0, 0.0], [0.0], [0.0], [0.0], [0.0], [0.0]])


def test_forking_tokens_of_all_tokens_is_dapo():
    loss, grad, _ = loss_and_grad(hapo.method("forking_tokens", rho=1.0), worked_batch())
    dapo_loss, dapo_grad, _ = loss_and_grad(hapo.method("dapo"), worked_batch())
    assert loss == dapo_loss
    assert torch.equal(grad, dapo_grad)


@pytest.mark.parametrize(
    ("entropies", "rho", "kept"),
    [
        pytest.param([0.1, 0.5, 0.5, 0.5, 0.9], 0.4, [1, 2, 3, 4], id="ties stay"),
        pytest.param([0.1, 0.2, 0.3, 0.4, 0.5], 0.61, [1, 2, 3, 4], id="a fraction is rounded up"),
        pytest.param([t / 25 for t in range(25)], 0.28, list(range(18, 25)), id="an exact product is not"),
        pytest.param([0.1, 0.2, 0.3, 0.4, 0.5], 1e-12, [4], id="at least one"),
        pytest.param([0.0, 0.0, 0.0, 0.0, 0.0], 0.2, [0, 1, 2, 3, 4], id="all equal"),
    ],
)
def test_forking_tokens_at_the_threshold(entropies, rho, kept):
    """The last column is masked and the most uncertain of all. 0.28 x 25 is 7.000000000000001."""
    h = torch.tensor([[*entropies, 9.0]])
    assert most_uncertain(h, h < 9, rho)[0].nonzero().flatten().tolist() == kept


def test_forking_tokens_goes_by_the_order_of_entropies():
    h, mask = padded(ENTROPY), ~padded(ENTROPY).isnan()
    assert torch.equal(most_uncertain(h, mask, 0.4), most_uncertain((3 * h).exp(), mask, 0.4))
    batch = worked_batch(old_entropy=-padded(ENTROPY) + 3)
    current = one_step(hapo.method("forking_tokens"), batch).keep
    at_rollout = one_step(hapo.method("forking_tokens", entropy_source="old"), batch).keep
    assert not (current & at_rollout).any()


def test_the_penalty_is_a_mean_of_all_valid_tokens_also_of_those_not_kept():
    batch = worked_batch()
    with_penalty, without = (
        loss_and_grad(hapo.method("forking_tokens", kl_coef=c, filter_groups=False), batch)[0] for c in (0.1, 0.0)
    )
    expected = k3(batch.logp.detach(), batch.ref_logp)[batch.mask].mean().item()
    assert (with_penalty - without) / 0.1 == pytest.approx(expected, abs=1e-5)
