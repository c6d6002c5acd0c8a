"""The laws of the library, on every supervised method and its option sets; `test_laws.py` has those of the policy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hapo
from hapo.batch import TOKEN_FIELDS
from hapo.methods import policy, supervised
from tests.test_laws import declared, same

VARIANTS = [
    ("ranktuner", {"estimator": "exact"}),
    ("ranktuner", {"base_weight": 1}),
    ("ranktuner", {"estimator": "exact", "base_weight": 1}),
    *declared("SUPERVISED_VARIANTS"),
]
EVERY = [
    pytest.param(hapo.method(name, **options), id=name + "".join(f"-{k}={v}" for k, v in options.items()))
    for name, options in [*((name, {}) for name in hapo.methods("supervised")), *VARIANTS]
]
every_method = pytest.mark.parametrize("method", EVERY)
law = settings(max_examples=25, deadline=None, derandomize=True, database=None)


@st.composite
def targets(draw, dtype=torch.float32) -> hapo.TokenBatch:
    """Rows of 0..T targets, certain and impossible ones among them, with every field that a weight reads."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    b, t = draw(st.integers(0, 9)), draw(st.integers(1, 7))

    def rand() -> torch.Tensor:
        return torch.rand(b, t, generator=g, dtype=torch.float64).to(dtype)

    logp = torch.where(rand() < 0.1, 0.0, -draw(st.sampled_from([0.1, 3.0, 100.0])) * rand())
    return hapo.TokenBatch(
        mask=torch.arange(t) < torch.randint(0, t + 1, (b, 1), generator=g),
        logp=logp.requires_grad_(),
        entropy=8 * rand() * (rand() < 0.9),
        rank=1 + (500 * rand().square()).floor(),
        expected_rank=1 + 100 * rand(),
    )


def gradient(method: hapo.Supervised, batch: hapo.TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and d loss / d logp."""
    loss = method.loss(batch).loss
    return loss.detach(), torch.autograd.grad(loss, batch.logp)[0]


def alive(batch: hapo.TokenBatch, **changes: torch.Tensor) -> hapo.TokenBatch:
    """With changes, and its own leaf for the gradient."""
    batch = batch.replace(**changes)
    return batch.replace(logp=batch.logp.detach().requires_grad_())


@every_method
@law
@given(batch=targets(), data=st.data())
def test_split(method, batch, data):
    """Micro-batches in any order add up to the whole, value, gradient and metrics."""
    whole = method.loss(batch)
    (grad,) = torch.autograd.grad(whole.loss, batch.logp)
    step = batch.replace(totals=batch.count())
    order = torch.tensor(data.draw(st.permutations(range(len(batch)))), dtype=torch.long)
    total, pieces = torch.zeros(()), torch.zeros_like(grad)
    metrics = {name: torch.zeros(()) for name in whole.metrics}
    while len(order):
        n = data.draw(st.integers(1, len(order)))
        out = method.loss(step.rows(order[:n]))
        total = total + out.loss.detach()
        pieces = pieces + torch.autograd.grad(out.loss, batch.logp)[0]
        metrics = {name: value + out.metrics[name] for name, value in metrics.items()}
        order = order[n:]
    same(total, whole.loss.detach())
    same(pieces, grad)
    for name, value in metrics.items():
        same(value, whole.metrics[name])


@every_method
@law
@given(batch=targets())
def test_packing_and_padding(method, batch):
    """All rows end to end in one, or in rows of twice the width, are the same step."""
    loss, grad = gradient(method, batch)
    fields = [name for name in ("mask", *TOKEN_FIELDS) if getattr(batch, name) is not None]
    packed = alive(batch, **{name: getattr(batch, name).detach().reshape(1, -1) for name in fields})
    padding = {name: getattr(batch, name).detach() for name in fields}
    wide = {name: torch.cat([x, torch.zeros_like(x)], 1) for name, x in padding.items()}
    for other, back in (
        (packed, lambda x: x.reshape(grad.shape)),
        (alive(batch, **wide), lambda x: x[:, : grad.shape[1]]),
    ):
        loss2, grad2 = gradient(method, other)
        same(loss2, loss)
        same(back(grad2), grad)


@every_method
@law
@given(batch=targets(), garbage=st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e30]))
def test_mask(method, batch, garbage):
    loss, grad = gradient(method, batch)
    fields = [name for name in TOKEN_FIELDS if getattr(batch, name) is not None]
    poison = {name: torch.where(batch.mask, getattr(batch, name).detach(), garbage) for name in fields}
    loss2, grad2 = gradient(method, alive(batch, **poison))
    assert torch.equal(loss, loss2) and torch.equal(grad, grad2)
    assert (grad[~batch.mask] == 0).all()


@every_method
@law
@given(batch=targets(torch.float64))
def test_detach(method, batch):
    """The gradient is -w m / N: nothing of p, R, E or H is differentiated."""
    leaves = {
        name: getattr(batch, name).detach().requires_grad_()
        for name in ("logp", "entropy", "rank", "expected_rank")
    }
    out = method.loss(batch.replace(**leaves))
    (by_logp, *others) = torch.autograd.grad(out.loss, list(leaves.values()), allow_unused=True)
    assert others == [None, None, None]
    same(by_logp, -out.tokens["weight"] / max(1, int(batch.mask.sum())), 1e-12)
    assert not out.tokens["weight"].requires_grad


@every_method
@law
@given(batch=targets())
def test_edges_are_finite(method, batch):
    loss, grad = gradient(method, batch)
    assert loss.isfinite() and grad.isfinite().all()
    empty = alive(batch, mask=torch.zeros_like(batch.mask))
    loss, grad = gradient(method, empty)
    assert loss == 0 and (grad == 0).all()


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(method, dtype):
    """Half-precision inputs are computed in float32: they agree with the same numbers in float64."""
    g = torch.Generator().manual_seed(3)
    half = {name: (3 * torch.rand(12, 9, generator=g)).to(dtype) for name in ("entropy", "rank", "expected_rank")}
    half["logp"] = -half["rank"] / 2
    half |= {name: half[name] + 1 for name in ("rank", "expected_rank")}
    mask = torch.rand(12, 9, generator=g) < 0.8
    (loss, grad), (exact, exact_grad) = (
        gradient(method, alive(hapo.TokenBatch(mask=mask, **{name: convert(x) for name, x in half.items()})))
        for convert in (lambda x: x, lambda x: x.double())
    )
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    assert abs(loss.double() - exact) <= 1e-5
    torch.testing.assert_close(grad.double(), exact_grad, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_every_method_says_what_it_misses():
    bare = hapo.TokenBatch(mask=torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="method 'sft' reads TokenBatch.logp"):
        hapo.method("sft").loss(bare)
    with pytest.raises(ValueError, match="method 'ranktuner' reads TokenBatch.rank, and it is missing"):
        hapo.method("ranktuner").loss(bare.replace(logp=torch.zeros(1, 2)))


@pytest.mark.parametrize("field", ["old_logp", "reward", "group"])
def test_a_policy_method_says_what_a_batch_of_targets_misses(field):
    given_fields = {
        "old_logp": torch.zeros(1, 2),
        "reward": torch.zeros(1),
        "group": torch.zeros(1, dtype=torch.long),
    }
    del given_fields[field]
    batch = hapo.TokenBatch(mask=torch.ones(1, 2, dtype=torch.bool), **given_fields)
    for name in ("grpo", "dapo"):
        with pytest.raises(ValueError, match=f"method '{name}' reads TokenBatch.{field}, and it is missing"):
            hapo.method(name).prepare(batch)


def test_each_kind_refuses_the_other_by_name():
    assert {*hapo.methods()} == {*hapo.methods("policy")} | {*hapo.methods("supervised")}
    assert hapo.methods()["sft"] == "supervised" and hapo.methods()["hapo"] == "policy"
    with pytest.raises(ValueError, match="'sft' is a supervised method: .*SupervisedTrainer"):
        policy("sft")
    with pytest.raises(ValueError, match="'hapo' is a policy method: .*HAPOTrainer"):
        supervised("hapo")
    assert isinstance(policy("hapo"), hapo.Method) and isinstance(supervised("dft"), hapo.Supervised)


def test_type_checkers_know_the_supervised_names():
    from typing import get_args

    from hapo.methods._registry import SupervisedName

    assert {*get_args(SupervisedName)} == {*hapo.methods("supervised")}
