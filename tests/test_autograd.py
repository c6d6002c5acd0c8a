"""The loss is plain autograd: torch differentiates it as often as one likes, and padding gets no gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hapo
from hapo.parts.surrogate import Surrogate
from hapo.stage import Record
from tests.examples import one_step
from tests.test_laws import VARIANTS

CASES = [*((name, {}) for name in hapo.methods("policy")), *VARIANTS]
ROWS, WIDTH = 4, 3


def prepared(method: hapo.Method) -> hapo.TokenBatch:
    """A group of four responses, float64, NaN at padding; ratios near 1, inside and outside the bounds."""
    g = torch.Generator().manual_seed(5)
    shape = (ROWS, WIDTH)

    def rand(scale: float) -> Tensor:
        return scale * torch.rand(shape, generator=g, dtype=torch.float64)

    mask = torch.arange(WIDTH) < torch.tensor([3, 2, 1, 3])[:, None]
    old = -rand(2) - 0.1
    fields = {
        "old_logp": old,
        "logp": old + rand(0.8) - 0.4,
        "ref_logp": old - rand(0.5),
        "sampler_logp": old + rand(0.4) - 0.2,
        "old_entropy": rand(2),
        "entropy": rand(2),
    }
    batch = hapo.TokenBatch(
        mask=mask,
        reward=torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64),
        rewards=torch.tensor([[1.0, 3], [0, 2], [0, 2], [1, 0]], dtype=torch.float64),
        group=torch.zeros(ROWS, dtype=torch.long),
        **{name: x.masked_fill(~mask, torch.nan) for name, x in fields.items()},
    )
    return one_step(method, batch)


def slopes(method: hapo.Method, batch: hapo.TokenBatch) -> Tensor:
    """The Jacobian of the gradient, by central differences of first derivatives: (N, N), N = B T."""
    step, rows = 1e-6, []
    for i, j in ((i, j) for i in range(ROWS) for j in range(WIDTH)):
        if not batch.mask[i, j]:
            rows.append(torch.zeros(ROWS * WIDTH, dtype=torch.float64))
            continue
        nudge = torch.zeros_like(batch.logp)
        nudge[i, j] = step
        up, down = (first(method, batch, (batch.logp + s * nudge).requires_grad_()) for s in (1, -1))
        rows.append((up - down).flatten() / (2 * step))
    return torch.stack(rows)


def first(method: hapo.Method, batch: hapo.TokenBatch, logp: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(method.loss(batch.replace(logp=logp)).loss, logp)
    return grad


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode
@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{'-'.join(o)}" for n, o in CASES])
def test_every_way_to_differentiate_agrees(name, options):
    """`torch.func.grad`, double backward and both hessians; second derivatives against finite differences."""
    method = hapo.method(name, **options)
    batch = prepared(method)

    def value(logp: Tensor) -> Tensor:
        return method.loss(batch.replace(logp=logp)).loss

    logp = batch.logp.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(logp), logp, create_graph=True)
    assert torch.equal(torch.func.grad(value)(batch.logp), grad)
    assert (grad[~batch.mask] == 0).all()
    assert grad.abs().max() > 0
    double = torch.zeros(ROWS * WIDTH, ROWS * WIDTH, dtype=torch.float64)
    if grad.requires_grad:  # CISPO's is a constant
        double = torch.stack(
            [
                torch.autograd.grad(g, logp, retain_graph=True, materialize_grads=True)[0].flatten()
                for g in grad.flatten()
            ]
        )
    if (
        "detach" not in method.breaks
    ):  # autograd takes what is stopped for a constant once more, differences do not
        torch.testing.assert_close(double, slopes(method, batch), atol=2e-7, rtol=1e-5)
    size = (ROWS * WIDTH, ROWS * WIDTH)
    twice = torch.autograd.functional.hessian(value, batch.logp).reshape(size)
    torch.testing.assert_close(twice, double)
    torch.testing.assert_close(torch.func.hessian(value)(batch.logp).reshape(size), double)


def at_its_place(logp: Tensor) -> Tensor:
    return logp.exp()


def of_the_whole_row(logp: Tensor) -> Tensor:
    return logp.sum(-1, keepdim=True).exp().expand_as(logp)


@pytest.mark.parametrize(
    ("garbage", "spread"), [(torch.nan, at_its_place), (torch.inf, at_its_place), (1e30, of_the_whole_row)]
)
def test_a_part_that_forgets_to_mask_leaks_nothing(garbage, spread):
    """Values and gradients at padding are dropped, also where they depend on every token of the row.

    Not even the core can take back NaN or inf times a valid token: 0 times it is NaN in the part's own backward.
    """
    plain = hapo.method("gspo", eps_low=0.2, eps_high=0.2)

    def careless(part):
        return lambda batch: part(batch) + at_padding(batch) * spread(batch.logp)

    def at_padding(batch: Record) -> Tensor:
        return torch.where(batch.mask, 0.0, garbage)

    def surrogate(batch: Record) -> Surrogate:
        out = plain.surrogate(batch)
        return out._replace(loss=out.loss + at_padding(batch) * spread(out.loss))

    method = plain.replace(
        ratio=careless(plain.ratio),
        surrogate=surrogate,
        advantage=careless(plain.advantage),
        penalty=careless(lambda batch: 0.0 * batch.logp),
        shaping=careless(lambda batch: batch.advantage),
    )
    assert method.prepare(prepared(plain)).advantage.isfinite().all()
    results = []
    for m in (plain, method):
        batch = prepared(plain)
        logp = batch.logp.clone().requires_grad_()
        out = m.loss(batch.replace(logp=logp))
        (grad,) = torch.autograd.grad(out.loss, logp)
        assert all(
            x.isfinite().all() for x in (*out.metrics.values(), out.tokens["advantage"], out.tokens["ratio"])
        )
        results.append((out.loss, grad))
    (loss, grad), (loss2, grad2) = results
    assert torch.equal(loss, loss2)
    assert torch.equal(grad, grad2)


def test_a_late_signal_reads_the_advantage_and_a_late_selection_the_ratio():
    """Signal at "step": made of all rows of the step, frozen. Selection at "loss": row by row."""
    method = hapo.method("grpo", kl_coef=0.0).replace(
        signal=lambda batch: batch.advantage * batch.entropy / batch.entropy.max(), signal_at="step"
    )
    assert method.step_reads_policy
    assert not method.loss_reads_entropy
    batch = prepared(method)
    entropy = torch.where(batch.mask, batch.entropy, 0.0)
    assert torch.equal(batch.signal, batch.advantage * entropy / entropy.max())
    out = method.loss(batch)
    assert torch.equal(out.tokens["signal"], batch.signal)

    method = hapo.method("grpo", kl_coef=0.0).replace(
        select=lambda batch: (batch.logp - batch.old_logp).abs() < 0.2, select_at="loss"
    )
    batch = prepared(method)
    assert batch.keep is None
    near = (batch.logp - batch.old_logp).abs() < 0.2
    out = method.loss(batch)
    assert torch.equal(out.tokens["kept"], near & batch.mask)
    halves = [method.loss(batch.rows(rows)).loss for rows in (slice(0, 1), slice(1, None))]
    torch.testing.assert_close(sum(halves), out.loss)
