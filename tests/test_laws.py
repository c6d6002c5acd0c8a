"""The laws of the library, on every registered method and on the option sets that change its stages."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hapo
from hapo.batch import TOKEN_FIELDS

VARIANTS: list[tuple[str, dict]] = [
    ("grpo", {"kl_coef": 0.0, "dual_clip": 3.0, "singleton": "reward"}),
    ("dapo", {"kl_coef": 0.01, "filter_groups": False, "dual_clip": 10.0}),
    ("hapo", {"filter_groups": False}),
    ("hapo", {"variant": "release"}),
    ("hapo", {"components": "B", "sampler_cap": None}),
    ("hapo", {"components": "C", "law": "zscore"}),
    ("hapo", {"components": "AD", "entropy_source": "current"}),
]
CASES = [(name, {}) for name in hapo.methods()] + VARIANTS
every_method = pytest.mark.parametrize(
    "method",
    [hapo.method(n, **o) for n, o in CASES],
    ids=[n + "".join(f"-{k}={v}" for k, v in o.items()) for n, o in CASES],
)
batteries = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def batches(draw, dtype=torch.float32) -> hapo.TokenBatch:
    """Lengths 0..T, groups of one, equal rewards, extreme ratios, zero and tied entropies."""
    seed = draw(st.integers(0, 2**31 - 1))
    b = draw(st.integers(0, 9))
    t = draw(st.integers(1, 7))
    spread = draw(st.sampled_from([0.02, 0.3, 50.0]))
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64).to(dtype)

    lengths = torch.randint(0, t + 1, (b,), generator=g)
    old = -3 * rand(b, t)
    entropy = torch.where(rand(b, t) < 0.15, 0.0, (4 * rand(b, t)).round(decimals=1))
    return hapo.TokenBatch(
        mask=torch.arange(t) < lengths[:, None],
        old_logp=old,
        logp=(old + spread * (2 * rand(b, t) - 1)).requires_grad_(),
        ref_logp=old + 0.1 * rand(b, t),
        sampler_logp=old + 0.5 * (2 * rand(b, t) - 1),
        old_entropy=entropy,
        entropy=entropy * (0.5 + rand(b, t)),
        reward=(rand(b) * draw(st.integers(0, 3))).round(),
        group=torch.randint(0, 3, (b,), generator=g) * 7 - 3,
    )


def gradient(method: hapo.Method, batch: hapo.TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and d loss / d logp of the whole batch as one step."""
    loss = method.loss(method.prepare(batch)).loss
    (grad,) = torch.autograd.grad(loss, batch.logp)
    return loss.detach(), grad


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> None:
    # An old-policy ratio of e^20 makes large numbers: relative to them float32 has six digits.
    torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=tolerance)


@every_method
@batteries
@given(batch=batches(), data=st.data())
def test_split(method, batch, data):
    loss, grad = gradient(method, batch)
    prepared = method.prepare(batch)
    order = torch.tensor(data.draw(st.permutations(range(len(batch)))), dtype=torch.long)
    total, pieces = torch.zeros(()), torch.zeros_like(grad)
    metrics: dict[str, torch.Tensor] = {}
    while len(order):
        n = data.draw(st.integers(1, len(order)))
        out = method.loss(prepared.rows(order[:n]))
        total = total + out.loss
        pieces = pieces + torch.autograd.grad(out.loss, batch.logp)[0]
        for k, v in out.metrics.items():
            metrics[k] = metrics.get(k, 0) + v
        order = order[n:]
    same(total.detach(), loss)
    same(pieces, grad)
    for k, v in metrics.items():
        same(v, method.loss(prepared).metrics[k])


@every_method
@batteries
@given(batch=batches(), data=st.data())
def test_split_into_optimiser_steps_counts_each_step_anew(method, batch, data):
    prepared = method.prepare(batch)
    cut = data.draw(st.integers(0, len(batch)))
    first = prepared.step(slice(0, cut))
    assert first.totals == first.count()
    assert first.totals + prepared.step(slice(cut, None)).totals == prepared.totals
    assert torch.equal(first.advantage, prepared.advantage[:cut])


@every_method
@batteries
@given(batch=batches(), data=st.data())
def test_row_order_and_padding_width(method, batch, data):
    loss, grad = gradient(method, batch)
    order = torch.tensor(data.draw(st.permutations(range(len(batch)))), dtype=torch.long)
    shuffled = batch.rows(order)
    wide = shuffled.replace(
        **{
            f.name: torch.cat([v, v.new_full((len(batch), 3), fill)], 1)
            for f in dataclasses.fields(batch)
            if isinstance(v := getattr(shuffled, f.name), torch.Tensor) and v.ndim == 2
            for fill in [False if v.dtype == torch.bool else float("nan")]
        }
    )
    wide = wide.replace(logp=wide.logp.detach().requires_grad_())
    loss2, grad2 = gradient(method, wide)
    same(loss2, loss)
    same(grad2[:, :-3], grad[order])
    assert (grad2[:, -3:] == 0).all()


@every_method
@batteries
@given(batch=batches(), garbage=st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e30]))
def test_mask(method, batch, garbage):
    loss, grad = gradient(method, batch)
    poison = {
        name: torch.where(batch.mask, value, garbage)
        for name in TOKEN_FIELDS
        if (value := getattr(batch, name)) is not None
    }
    poison["reward"] = torch.where(batch.mask.any(-1), batch.reward, garbage)
    poison["logp"] = poison["logp"].detach().requires_grad_()
    loss2, grad2 = gradient(method, batch.replace(**poison))
    assert torch.equal(loss, loss2)
    assert torch.equal(grad, grad2)


@every_method
@batteries
@given(batch=batches(dtype=torch.float64))
def test_detach(method, batch):
    """The one gradient path is logp, and it is the derivative of the loss with all else frozen."""
    alive = {
        name: getattr(batch, name).detach().requires_grad_()
        for name in TOKEN_FIELDS
        if getattr(batch, name) is not None
    }
    batch = batch.replace(**alive)
    loss = method.loss(method.prepare(batch)).loss
    grads = torch.autograd.grad(loss, list(alive.values()), allow_unused=True)
    for name, grad in zip(alive, grads, strict=True):
        if name != "logp":
            assert grad is None or (grad == 0).all(), name
    prepared, step = method.prepare(batch), 1e-6
    analytic = grads[list(alive).index("logp")]
    ratio = method.loss(prepared).tokens["ratio"]
    for i, j in prepared.mask.nonzero()[:6].tolist():
        if (batch.logp - batch.old_logp)[i, j].abs() > 19:
            continue  # the clamp of the log-ratio, where the loss has a kink
        losses = []
        for sign in (1, -1):
            nudged = batch.logp.detach().clone()
            nudged[i, j] += sign * step
            losses.append(method.loss(prepared.replace(logp=nudged)).loss.item())
        numeric = (losses[0] - losses[1]) / (2 * step)
        scale = 1e-6 * max(1.0, abs(losses[0])) + 1e-5 * ratio[i, j].item()
        assert abs(numeric - analytic[i, j].item()) <= scale


@every_method
@batteries
@given(batch=batches())
def test_edges_are_finite(method, batch):
    loss, grad = gradient(method, batch)
    assert loss.isfinite()
    assert grad.isfinite().all()
    if not batch.mask.any():
        assert loss == 0
        assert (grad == 0).all()


@every_method
def test_equal_rewards_and_groups_of_one(method):
    t = torch.full((3, 2), -1.0)
    batch = hapo.TokenBatch(
        mask=torch.ones(3, 2, dtype=torch.bool),
        old_logp=t,
        logp=t.clone().requires_grad_(),
        ref_logp=t,
        old_entropy=-t,
        entropy=-t,
        reward=torch.tensor([0.1, 0.1, 0.7]),
        group=torch.tensor([0, 0, 1]),
    )
    prepared = method.prepare(batch)
    assert (prepared.advantage[:2] == 0).all()
    alone = 0.7 if method.options.get("singleton") == "reward" and not method.filter_groups else 0.0
    assert prepared.advantage[2].tolist() == pytest.approx([alone, alone])


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(method, dtype):
    """Half-precision inputs are computed in float32: they agree with the same numbers in float64."""
    g = torch.Generator().manual_seed(3)
    shape = (12, 9)
    half = {k: (-2 * torch.rand(shape, generator=g)).to(dtype) for k in ("old_logp", "ref_logp", "sampler_logp")}
    half["logp"] = (half["old_logp"].float() + 0.4 * torch.rand(shape, generator=g) - 0.2).to(dtype)
    half["old_entropy"] = (3 * torch.rand(shape, generator=g)).to(dtype)
    half["entropy"] = half["old_entropy"]
    results = []
    for convert in (lambda x: x, lambda x: x.double()):
        fields = {k: convert(v) for k, v in half.items()}
        fields["logp"] = fields["logp"].requires_grad_()
        batch = hapo.TokenBatch(
            mask=torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.8,
            reward=convert((torch.arange(12) % 3 == 0).to(dtype)),
            group=torch.arange(12) // 4,
            **fields,
        )
        results.append(gradient(method, batch))
    (loss, grad), (exact, exact_grad) = results
    assert loss.dtype == torch.float32
    assert abs(loss.double() - exact) <= 1e-5
    assert grad.dtype == dtype
    # The gradient comes back in the caller's dtype: half a unit in its last place is its own rounding.
    torch.testing.assert_close(grad.double(), exact_grad, rtol=torch.finfo(dtype).eps, atol=1e-5)


@batteries
@given(batch=batches())
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("hapo", {"components": ""}), ("dapo", {})),
        (("hapo", {"components": "", "variant": "release"}), ("dapo", {"eps_high": 0.2, "dual_clip": 10.0})),
        (("hapo", {"components": "ACD", "alpha": 0.0, "beta": 0.0}), ("dapo", {})),
        (("dapo", {"eps_high": 0.2, "filter_groups": False}), ("grpo", {"kl_coef": 0.0})),
    ],
    ids=["hapo-is-dapo", "release-is-dapo", "hapo-knobs-at-zero", "dapo-advantage-is-grpo"],
)
def test_limits(batch, one, other):
    a, b = hapo.method(one[0], **one[1]), hapo.method(other[0], **other[1])
    p, q = a.prepare(batch), b.prepare(batch)
    assert torch.equal(p.advantage, q.advantage)
    out, ref = a.loss(p), b.loss(q)
    for name in ("ratio", "advantage", "low", "high", "clipped"):
        assert torch.equal(out.tokens[name], ref.tokens[name]), name
    if other[0] != "grpo":  # GRPO reduces by sequence
        assert torch.equal(out.loss, ref.loss)
        assert all(
            torch.equal(*g)
            for g in zip(
                torch.autograd.grad(out.loss, batch.logp), torch.autograd.grad(ref.loss, batch.logp), strict=True
            )
        )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(batch=batches())
def test_dapo_is_grpo_where_every_response_is_equally_long(batch):
    full = batch.replace(mask=torch.ones_like(batch.mask))
    a = gradient(hapo.method("dapo", eps_high=0.2, filter_groups=False), full)
    b = gradient(hapo.method("grpo", kl_coef=0.0), full)
    same(a[0], b[0])
    same(a[1], b[1])


def test_the_release_statistics_break_the_split_law():
    """stats_scope="micro_batch" is there to compare with; that it breaks law 1 is what its page says."""
    g = torch.Generator().manual_seed(0)
    old = -2 * torch.rand(8, 12, generator=g)
    batch = hapo.TokenBatch(
        mask=torch.ones(8, 12, dtype=torch.bool),
        old_logp=old,
        logp=(old + 0.6 * torch.rand(8, 12, generator=g) - 0.3).requires_grad_(),
        old_entropy=2 * torch.rand(8, 12, generator=g),
        entropy=2 * torch.rand(8, 12, generator=g),
        reward=torch.tensor([1.0, 0, 1, 0, 0, 1, 1, 0]),
        group=torch.arange(8) // 4,
    )

    def split_error(**options) -> float:
        method = hapo.method("hapo", **options)
        _, whole = gradient(method, batch)
        prepared = method.prepare(batch)
        halves = sum(method.loss(prepared.rows(s)).loss for s in (slice(0, 4), slice(4, 8)))
        (split,) = torch.autograd.grad(halves, batch.logp)
        return ((split - whole).norm() / whole.norm()).item()

    assert split_error(variant="release", stats_scope="micro_batch", entropy_source="current") > 0.02
    assert split_error(variant="release", entropy_source="current") < 1e-6
