"""OSG and OAdagrad: the numbers of their specification, its checks, and what torch's users expect of an optimiser."""

from __future__ import annotations

import io
import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from hapo.optim import OptimisticAdagrad, OptimisticSGD

WORKED = {
    (0, True): [
        ((0.5, 1.5), (1.5, -0.5), (0.25, 1.25), (2.802776, 2.118034)),
        ((-0.017592, 1.368034), (1.368034, 0.017592), (0.005950, 1.245847), (3.263077, 2.118172)),
        ((-0.203673, 1.241695), (1.241695, 0.203673), (-0.184314, 1.197770), (3.581341, 2.136570)),
    ],
    (1, True): [None, None, ((-0.339043, 1.189242), None, None, (3.267295, 2.125))],
    (0, False): [None, None, ((-0.264570, 1.216694), None, None, (3.395264, 1.567889))],
}
"""(lag, include_g0) -> z_k, g_k, x_k, H_k for k = 1, 2, 3 of the bilinear game."""

BOTH = [(OptimisticSGD, {})] + [
    (OptimisticAdagrad, {"delta": 0.7, "lag": lag, "include_g0": g0}) for lag in (0, 1) for g0 in (True, False)
]


def game(kind, dtype=torch.float64, swapped=False, **options):
    """F = u v from (1, 1); swapped, the players of -F change places."""
    u, v = (nn.Parameter(torch.ones((), dtype=dtype)) for _ in range(2))
    lowers, raises = (v, u) if swapped else (u, v)
    optimizer = kind([{"params": [lowers]}, {"params": [raises], "maximize": True}], **options)

    def closure():
        optimizer.zero_grad()
        value = -u * v if swapped else u * v
        value.backward()
        return value

    return u, v, optimizer, closure


def of(*pair):
    return tuple(x.item() for x in pair)


@pytest.mark.parametrize(("lag", "include_g0"), WORKED)
def test_worked_example_of_oadagrad(lag, include_g0):
    u, v, optimizer, closure = game(OptimisticAdagrad, lr=0.5, delta=1.0, lag=lag, include_g0=include_g0)
    optimizer.step(closure)
    assert of(u.grad, -v.grad) == (1, -1)
    for expected in WORKED[lag, include_g0]:
        z = of(u, v)
        optimizer.step(closure)
        found = z, of(u.grad, -v.grad), of(*map(optimizer.x, (u, v))), of(*map(optimizer.metric, (u, v)))
        for mine, theirs in zip(found, expected or (), strict=False):
            assert theirs is None or mine == pytest.approx(theirs, abs=1e-6)


def test_worked_example_of_osg():
    u, v, optimizer, closure = game(OptimisticSGD, lr=0.5)
    for z in [(1, 1), (0.5, 1.5), (-0.5, 1.5), (-1.25, 0.75)]:
        assert of(u, v) == z
        optimizer.step(closure)
    assert of(optimizer.x(u), optimizer.x(v)) == (-0.875, 0.375)


def test_the_bilinear_game_is_won_by_optimism_alone():
    u, v, optimizer, closure = game(OptimisticSGD, lr=0.3)
    for _ in range(400):
        optimizer.step(closure)
    assert math.hypot(*of(u, v)) < 1e-8
    u, v, optimizer, closure = game(OptimisticAdagrad, lr=0.5, delta=1.0)
    norms = {}
    for k in range(1001):
        norms[k] = math.hypot(*of(u, v))  # of z_k
        optimizer.step(closure)
    assert norms[100] == pytest.approx(0.550191, abs=1e-6) and norms[1000] == pytest.approx(0.086749, abs=1e-6)
    u, v, optimizer, closure = game(torch.optim.SGD, lr=0.3)
    for k in range(20):
        assert math.hypot(*of(u, v)) == pytest.approx(math.sqrt(2) * math.sqrt(1.09) ** k)
        optimizer.step(closure)


def field(z, k):
    """A field that is no gradient, with noise that depends on the step alone."""
    turn = torch.tensor([[0.3, 1.0, 0.0], [-1.0, 0.2, 0.5], [0.0, -0.5, 0.4]], dtype=z.dtype)
    return turn @ z + 0.3 * torch.sin(5 * k + torch.arange(3, dtype=z.dtype))


START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def trajectory(kind, steps, lr=0.2, **options):
    """z_0 .. z_steps, and the optimiser; lr is a number, or one per call."""
    p = nn.Parameter(START.clone())
    optimizer = kind([p], **options)
    zs = []
    for k in range(steps + 1):
        zs.append(p.detach().clone())
        optimizer.param_groups[0]["lr"] = lr if isinstance(lr, float) else lr[k]
        p.grad = field(p.detach(), k)
        optimizer.step()
    return torch.stack(zs), optimizer


def metrics(gradients, options):
    """H_0, H_1, ... from all gradients, by their definition; of OSG they are 1."""
    if not options:
        return [torch.ones(3, dtype=torch.float64)] * len(gradients)
    counted = torch.stack(gradients).square()
    if not options["include_g0"]:
        counted[0] = 0
    s = counted.cumsum(0).sqrt()
    if options["lag"]:
        s = torch.cat([torch.zeros_like(s[:1]), s[:-1]])
    s[0] = 0
    return list(options["delta"] + s)


@pytest.mark.parametrize(("kind", "options"), BOTH)
def test_the_two_sequences_the_one_sequence_and_the_optimiser_agree(kind, options):
    zs, _ = trajectory(kind, 200, **options)
    eta = 0.2
    x = START.clone()
    gradients = [field(x, 0)]
    for k in range(1, 201):
        h = metrics(gradients, options)[k - 1]
        z = x - eta * gradients[-1] / h
        torch.testing.assert_close(zs[k], z, rtol=0, atol=1e-12)
        gradients.append(field(z, k))
        x = x - eta * gradients[-1] / h
    z = START - eta * field(START, 0) / metrics([field(START, 0)], options)[0]
    gradients = [field(START, 0)]
    for k in range(1, 201):
        torch.testing.assert_close(zs[k], z, rtol=0, atol=1e-12)
        gradients.append(field(z, k))
        h = metrics(gradients, options)
        z = z - eta * (gradients[k] - gradients[k - 1]) / h[k - 1] - eta * gradients[k] / h[k]


@pytest.mark.parametrize(("kind", "options"), BOTH)
def test_a_schedule_counts_for_both_lines_of_a_step(kind, options):
    rates = [0.0, 0.1, 0.2, 0.15, 0.05, 0.3, 0.01]
    zs, optimizer = trajectory(kind, 6, rates, **options)
    x, gradients = START.clone(), []
    for k, eta in enumerate(rates):
        gradients.append(field(zs[k], k))
        h = metrics(gradients, options)
        if k:
            x = x - eta * gradients[k] / h[k - 1]
        if k < 6:
            torch.testing.assert_close(zs[k + 1], x - eta * gradients[k] / h[k], rtol=0, atol=1e-14)
    (p,) = optimizer.param_groups[0]["params"]
    torch.testing.assert_close(optimizer.x(p), x, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("kind", "options"), BOTH)
def test_n_steps_take_n_plus_1_gradients_and_a_closure_is_called_once(kind, options):
    u, _, optimizer, closure = game(kind, lr=0.5, **options)
    values = []
    for _ in range(1 + 3):
        values.append(optimizer.step(lambda: values.append("call") or closure()))
    assert [value for value in values if value == "call"] == ["call"] * 4
    assert values[1].item() == 1 and values[1].requires_grad
    assert optimizer.state[u]["step"] == 4


def test_with_a_constant_metric_oadagrad_is_osg():
    class Frozen(OptimisticAdagrad):
        @staticmethod
        def _metrics(states, group, into=None):
            return into or [torch.full_like(state["sum"], group["delta"]) for state in states]

    for lag in (0, 1):
        frozen, _ = trajectory(Frozen, 50, delta=1.0, lag=lag)
        torch.testing.assert_close(frozen, trajectory(OptimisticSGD, 50)[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("lag", [0, 1])
def test_the_metric_never_falls_and_is_at_least_delta(lag):
    p = nn.Parameter(START.clone())
    optimizer = OptimisticAdagrad([p], lr=0.2, delta=0.5, lag=lag)
    h = [optimizer.metric(p)]
    for k in range(30):
        p.grad = field(p.detach(), k)
        p.grad[1] = 0
        optimizer.step()
        h.append(optimizer.metric(p))
    h = torch.stack(h)
    assert (h[0] == 0.5).all() and (h.diff(dim=0) >= 0).all() and (h[-1][[0, 2]] > 1).all()
    assert (h[:, 1] == 0.5).all() and p[1] == START[1], "without a gradient a coordinate never moves"


def test_swapping_the_players_with_the_sign_changes_nothing():
    for kind, options in BOTH:
        u, v, optimizer, closure = game(kind, lr=0.5, **options)
        a, b, other, its = game(kind, lr=0.5, swapped=True, **options)
        for _ in range(20):
            optimizer.step(closure)
            other.step(its)
            assert of(u, v) == of(a, b)


def test_a_common_scale_of_gradients_and_delta_changes_nothing():
    for c in (8.0, 1000.0):
        paths = []
        for scale in (1.0, c):
            p = nn.Parameter(START.clone())
            optimizer = OptimisticAdagrad([p], lr=0.2, delta=0.5 * scale)
            for k in range(40):
                p.grad = scale * field(p.detach(), k)
                optimizer.step()
            paths.append(p.detach())
        torch.testing.assert_close(*paths, rtol=0, atol=0 if c == 8 else 1e-13)


@pytest.mark.parametrize(("kind", "options"), BOTH)
def test_one_optimiser_of_both_players_is_two_of_one_each(kind, options):
    u, v, optimizer, closure = game(kind, lr=0.5, **options)
    a, b, *_ = game(kind, lr=0.5)
    one, two = kind([a], lr=0.5, **options), kind([b], lr=0.5, maximize=True, **options)
    for _ in range(20):
        optimizer.step(closure)
        for p in (a, b):
            p.grad = None
        (a * b).backward()
        one.step()
        two.step()
        assert of(u, v) == of(a, b)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]


def several(dtype):
    """Parameters of unequal shapes; the last one is not contiguous."""
    torch.manual_seed(0)
    shapes = [(3, 4), (5,), (), (4, 3)]
    made = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return [nn.Parameter(x) for x in [*made[:3], made[3].t()]]


def drive(optimizer, ps, begin, end):
    """Noisy gradients of step k; the second parameter has none at times, the third comes in later."""
    for k in range(begin, end):
        torch.manual_seed(k)
        for i, p in enumerate(ps):
            p.grad = p.detach() + torch.randn(p.shape, dtype=p.dtype)
            if (i == 1 and k % 3 == 1) or (i == 2 and k < 4):
                p.grad = None
        optimizer.step()


CASES = [(kind, options, dtype) for kind, options in BOTH for dtype in DTYPES]
CASES = [case for case in CASES if not (case[1].get("lag") and case[2] is torch.bfloat16)]


@pytest.mark.parametrize(("kind", "options", "dtype"), CASES)
def test_foreach_is_the_loop_bit_for_bit(kind, options, dtype):
    ends = []
    for foreach in (True, False, None):
        ps = several(dtype)
        groups = [{"params": ps[:2]}, {"params": ps[2:], "lr": 0.03, "weight_decay": 0.1}]
        optimizer = kind(groups, lr=0.1, foreach=foreach, **options)
        drive(optimizer, ps, 0, 8)
        ends.append(ps)
    assert not torch.equal(ends[0][0], several(dtype)[0])
    for other in ends[1:]:
        assert all(torch.equal(p, q) for p, q in zip(ends[0], other, strict=True))


@pytest.mark.parametrize(("kind", "options", "dtype"), CASES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind, options, dtype):
    if kind is OptimisticSGD:
        options = {"projection": lambda x: x if x.is_complex() else x.clamp(-1, 1)}
    for at in range(4):
        ps = several(dtype)
        optimizer = kind([{"params": ps[:1], "lr": 0.2}, {"params": ps[1:]}], lr=0.1, **options)
        drive(optimizer, ps, 0, at)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        copies = [nn.Parameter(p.detach().clone()) for p in ps]
        resumed = kind([{"params": copies[:1]}, {"params": copies[1:]}], lr=0.9, **options)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        drive(optimizer, ps, at, 9)
        drive(resumed, copies, at, 9)
        for p, q in zip(ps, copies, strict=True):
            assert torch.equal(p, q) and torch.equal(optimizer.x(p), resumed.x(q))


def test_a_loaded_state_is_a_copy():
    zs, optimizer = trajectory(OptimisticAdagrad, 3)
    saved = optimizer.state_dict()
    before = deepcopy(saved)
    q = nn.Parameter(zs[-1].clone())
    other = OptimisticAdagrad([q])
    other.load_state_dict(saved)
    q.grad = torch.ones_like(q)
    other.step()
    assert torch.equal(saved["state"][0]["sum"], before["state"][0]["sum"])


@pytest.mark.parametrize(("kind", "options"), BOTH)
def test_a_parameter_without_a_gradient_waits(kind, options):
    """Its path over the steps at which it has one is what it would be without the others."""
    p, q = (nn.Parameter(START.clone()) for _ in range(2))
    optimizer, alone = kind([p], lr=0.2, **options), kind([q], lr=0.2, **options)
    for k in range(12):
        p.grad = None if k in (0, 3, 4) else field(p.detach(), k)
        optimizer.step()
        if p.grad is not None:
            q.grad = p.grad.clone()
            alone.step()
        assert torch.equal(p, q)
    assert optimizer.state[p]["step"] == 9


@pytest.mark.parametrize(("kind", "options"), BOTH)
def test_weight_decay_is_the_gradient_of_its_penalty_and_maximize_a_sign(kind, options):
    p, q = (nn.Parameter(START.clone()) for _ in range(2))
    decayed = kind([p], lr=0.2, weight_decay=0.3, maximize=True, **options)
    plain = kind([q], lr=0.2, **options)
    for k in range(10):
        p.grad = -field(p.detach(), k)
        q.grad = field(q.detach(), k) + 0.3 * q.detach()
        decayed.step()
        plain.step()
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("kind", "options"), BOTH)
def test_a_complex_parameter_is_its_real_and_imaginary_parts(kind, options):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(3, dtype=torch.complex128))
    q = nn.Parameter(torch.view_as_real(p.detach()).clone())
    one, two = kind([p], lr=0.2, **options), kind([q], lr=0.2, **options)
    for _ in range(6):
        gradient = torch.randn(3, 2, dtype=torch.float64)
        p.grad, q.grad = torch.view_as_complex(gradient).clone(), gradient
        one.step()
        two.step()
        torch.testing.assert_close(torch.view_as_real(p.detach()), q.detach(), rtol=0, atol=1e-14)
        torch.testing.assert_close(torch.view_as_real(one.x(p)), two.x(q), rtol=0, atol=1e-14)
    if options:
        torch.testing.assert_close(one.metric(p), two.metric(q), rtol=0, atol=1e-14)


@pytest.mark.parametrize("foreach", [True, False])
def test_a_projection_is_applied_to_both_sequences(foreach):
    def proj(x):
        return x.clamp(-1, 1)

    p, still = nn.Parameter(START.clone()), nn.Parameter(START.clone())
    groups = [{"params": [p], "projection": proj}, {"params": [still]}]
    optimizer = OptimisticSGD(groups, lr=0.2, foreach=foreach)
    x, z, bound = START.clone(), START.clone(), 0
    for k in range(20):
        torch.testing.assert_close(p.detach(), z, rtol=0, atol=1e-14)
        p.grad = g = field(z, k)
        still.grad = torch.zeros(3, dtype=torch.float64)
        optimizer.step()
        if k:
            x = proj(x - 0.2 * g)
        z = proj(x - 0.2 * g)
        bound += (z.abs() == 1).any().item()
        torch.testing.assert_close(optimizer.x(p), x, rtol=0, atol=1e-14)
        assert torch.equal(still, START)
    assert bound > 2, "the projection must act"
    assert all("projection" not in group for group in optimizer.state_dict()["param_groups"])


@pytest.mark.parametrize(("kind", "options"), BOTH)
def test_a_parameter_has_two_states_at_most(kind, options):
    ps = several(torch.float32)
    optimizer = kind(ps, **options)
    drive(optimizer, ps, 0, 6)
    for p in ps:
        tensors = [value for value in optimizer.state[p].values() if isinstance(value, torch.Tensor)]
        assert len(tensors) == (2 if options else 1) and all(x.shape == p.shape for x in tensors)


def test_half_precision_is_stepped_in_float32():
    """2,000 steps of 1e-4: each is lost in bfloat16 beside 1."""
    for kind in (OptimisticSGD, OptimisticAdagrad):
        p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        optimizer = kind([p], lr=1e-4, **({"delta": 1e3} if kind is OptimisticAdagrad else {}))
        p.grad = torch.full_like(p, 1e3 if kind is OptimisticAdagrad else 1.0)
        for _ in range(2_000):
            optimizer.step()
        assert optimizer.x(p).dtype == torch.float32 and (p < 0.995).all()
    ps = several(torch.bfloat16)
    optimizer = OptimisticAdagrad(ps, lag=1)
    with pytest.raises(ValueError, match=r"lag=1 .* torch.bfloat16 rounds: take lag=0, or keep the weights in"):
        drive(optimizer, ps, 0, 1)


def test_a_sparse_gradient_is_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = OptimisticAdagrad(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"of shape \(5, 2\) is sparse \(layout torch.sparse_coo\).*sparse=False"):
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (OptimisticSGD, {"lr": -1.0}, "lr must be at least 0 and finite, got -1.0"),
        (OptimisticAdagrad, {"lr": math.nan}, "lr must be at least 0 and finite, got nan"),
        (OptimisticAdagrad, {"weight_decay": -0.1}, "weight_decay must be at least 0 and finite, got -0.1"),
        (OptimisticAdagrad, {"delta": 0.0}, "delta must be above 0 and finite, got 0.0: take a bound"),
        (OptimisticAdagrad, {"lag": 2}, "lag must be 0 or 1, got 2"),
        (OptimisticSGD, {"projection": 1.0}, "projection must take a tensor and return one, got 1.0"),
        (
            OptimisticSGD,
            {"differentiable": True},
            "differentiable=True cannot be honoured by OptimisticSGD: a step",
        ),
        (OptimisticAdagrad, {"capturable": True}, "capturable=True cannot be honoured by OptimisticAdagrad: the"),
        (OptimisticAdagrad, {"fused": True}, "fused=True cannot be honoured by OptimisticAdagrad: .*foreach=True"),
    ],
)
def test_what_cannot_be_honoured_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind([nn.Parameter(START.clone())], **options)
    with pytest.raises(ValueError, match=message):  # and in a group
        kind([{"params": [nn.Parameter(START.clone())], **options}])


@pytest.mark.parametrize(
    ("kind", "option", "message"),
    [
        (OptimisticSGD, {"momentum": 0.9}, "momentum=0.9 cannot be honoured by OptimisticSGD: neither"),
        (OptimisticSGD, {"delta": 0.5}, "delta=0.5 cannot be honoured by OptimisticSGD: .*OptimisticAdagrad"),
        (OptimisticAdagrad, {"projection": abs}, "cannot be honoured by OptimisticAdagrad: .*unconstrained"),
        (OptimisticAdagrad, {"eps": 1e-8}, "eps=1e-08 cannot be honoured by OptimisticAdagrad: delta"),
    ],
)
def test_an_option_of_another_optimiser_is_refused_in_a_group(kind, option, message):
    optimizer = kind([nn.Parameter(START.clone())])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(START.clone())], **option})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [nn.Parameter(START.clone())], "name": "generator"})


def test_schedulers_and_deep_copies_work():
    p = nn.Parameter(START.clone())
    optimizer = OptimisticAdagrad([p], lr=torch.tensor(0.2))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=4)
    for k in range(6):
        p.grad = field(p.detach(), k)
        optimizer.step()
        schedule.step()
    rates = [0.1, 0.125, 0.15, 0.175, 0.2, 0.2, 0.2]
    torch.testing.assert_close(p.detach(), trajectory(OptimisticAdagrad, 6, rates)[0][-1], rtol=0, atol=1e-8)
    assert deepcopy(optimizer).state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
