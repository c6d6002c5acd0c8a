"""GSPO: worked example at two scales, in both forms; clipping and permutation of whole responses."""

import math

import pytest
import torch

import hapo
from tests.examples import OLD, close, example, loss_and_grad, on_tokens, token_losses, worked_batch

F64 = torch.float64


@pytest.mark.parametrize("form", ["sequence", "token"])
def test_gspo(form):
    batch, method = worked_batch(), hapo.method("gspo", form=form)
    loss, grad, out = loss_and_grad(method, batch)
    assert loss == pytest.approx(0.022050, abs=1e-6)
    ratio = [1.119072, 0.904837, 1.058303, 0.904837, 1.016806, 0.927743]
    close(out.tokens["ratio"], on_tokens(ratio, OLD), batch.mask)
    close(out.tokens["clipped"], on_tokens([1.0, 1.0, 0.0, 0.0, 0.0, 0.0], OLD), batch.mask)
    losses = [-0.866370, 0.865764, 0.916516, -0.783611, 0.0, 0.0]
    close(token_losses(method, batch, out), on_tokens(losses, OLD), batch.mask)
    close(grad, on_tokens([0.0, 0.0, 0.050918, -0.065301, 0.0, 0.0], OLD))


@pytest.mark.parametrize("form", ["sequence", "token"])
def test_gspo_of_ratios_near_one(form):
    """A thousandth of the log-ratios, in float64, to the eight decimals of the figures."""
    batch = worked_batch(dtype=F64)
    near = batch.old_logp + 1e-3 * (batch.logp.detach() - batch.old_logp)
    batch = batch.replace(logp=near.requires_grad_())
    loss, grad, out = loss_and_grad(hapo.method("gspo", form=form), batch)
    assert loss == pytest.approx(-0.00000806, abs=1e-8)
    ratio = [1.00011251, 0.99990000, 1.00005667, 0.99990000, 1.00001667, 0.99992500]
    close(out.tokens["ratio"], on_tokens(ratio, OLD), batch.mask, atol=1e-8)
    assert not out.tokens["clipped"].any()
    close(grad, on_tokens([-0.036088, 0.072161, 0.048115, -0.072161, 0.0, 0.0], OLD))


def test_gspo_token_form_has_gradients_of_its_own_where_weights_differ():
    """-A s w / (S n) with the token's sampler weight w; the sequence form spreads their mean."""
    batch = example(old=[[-1.0, -1.0], [-1.0]], new=[[-1.0, -1.0], [-1.0]], reward=[1.0, 0.0])
    batch = batch.replace(sampler_logp=batch.old_logp - torch.tensor([[0.5, 0.0], [0.0, 0.0]]))
    weight = [math.exp(0.5), 1.0]
    scale = math.sqrt(0.5) / 4
    for form, factors in (("token", weight), ("sequence", [sum(weight) / 2] * 2)):
        _, grad, _ = loss_and_grad(hapo.method("gspo", form=form), batch)
        close(grad, [[-scale * f for f in factors], [2 * scale]])


def test_gspo_sees_only_the_mean_of_the_log_ratios():
    batch = worked_batch(dtype=F64)
    rolled = batch.replace(old_logp=batch.old_logp.clone(), logp=batch.logp.detach().clone())
    for i, row in enumerate(OLD):
        for field in (rolled.old_logp, rolled.logp):
            field[i, : len(row)] = field[i, : len(row)].roll(1)
    rolled = rolled.replace(logp=rolled.logp.requires_grad_())
    loss, grad, _ = loss_and_grad(hapo.method("gspo"), batch)
    other_loss, other_grad, _ = loss_and_grad(hapo.method("gspo"), rolled)
    assert other_loss == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(other_grad, grad)


def test_gspo_of_one_token_responses_is_grpo():
    batch = example(old=[[-1.0], [-0.2], [-0.7]], new=[[-0.8], [-0.35], [-0.9]], reward=[1.0, 0.0, 0.0])
    options = {"eps_low": 0.17, "eps_high": 0.1, "kl_coef": 0.0}
    loss, grad, out = loss_and_grad(hapo.method("gspo", **options), batch)
    grpo_loss, grpo_grad, _ = loss_and_grad(hapo.method("grpo", **options), batch)
    assert out.tokens["clipped"].tolist() == [[True], [False], [True]]
    assert loss == grpo_loss
    assert torch.equal(grad, grpo_grad)
