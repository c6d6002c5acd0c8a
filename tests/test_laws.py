"""The laws of the library, on every registered method and on the option sets that change its stages.

A method whose definition breaks a law says so in `Method.breaks`; the battery then checks that it breaks that law,
and holds every other.
"""

import dataclasses
import importlib
import itertools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hapo
from hapo.batch import TOKEN_FIELDS
from hapo.methods.hapo import bounded_signal
from hapo.parts.advantage import group_advantage
from hapo.parts.entropy import entropy_stats
from hapo.parts.ratio import sequence_ratio
from hapo.parts.reduce import sequence_sum, token_mean
from hapo.stage import Record, Stage
from tests.examples import on_policy, one_step, one_token, right_or_wrong, unclamped

VARIANTS: list[tuple[str, dict]] = [
    ("archer", {"variant": "release", "entropy_source": "old", "filter_groups": True, "dual_clip": 10.0}),
    ("aspo", {"eps_uncertain": 0.4, "dual_clip": 2.0}),
    ("ce_gppo", {"dual_clip": 10.0, "beta1": 0.0}),
    ("cispo", {"trust_region": (0.2, 0.28), "is_weight_floor": 0.8, "filter_groups": False}),
    ("dapo", {"kl_coef": 0.01, "filter_groups": False, "dual_clip": 10.0, "temperature": {"tau": 0.1}}),
    ("dr_grpo", {"length_limit": 7, "kl_coef": 0.01, "singleton": "reward"}),
    ("edge_grpo", {"variant": "release"}),
    ("edge_grpo", {"clamp": (0.1, 10.0)}),
    ("entropy_adv", {"entropy_source": "old", "dual_clip": 3.0}),
    ("forking_tokens", {"entropy_source": "old", "kl_coef": 0.01}),
    ("grpo", {"kl_coef": 0.0, "dual_clip": 3.0, "singleton": "reward"}),
    ("grpo_s", {"variant": "own"}),
    ("grpo_s", {"variant": "joint", "singleton": "reward"}),
    ("gspo", {"form": "token", "eps_low": 0.2, "eps_high": 0.28}),
    ("gtpo", {"variant": "own", "filter_groups": True, "singleton": "reward"}),
    ("hapo", {"filter_groups": False}),
    ("hapo", {"variant": "release"}),
    ("hapo", {"variant": "release", "entropy_source": "current"}),
    ("hapo", {"components": "B", "sampler_cap": None}),
    ("hapo", {"components": "CA", "temperature": {"rule": "zscore"}}),
    ("hapo", {"components": "AD", "entropy_source": "current"}),
    ("rloo", {"clip": (0.2, 0.2), "kl_coef": 0.05, "singleton": "reward"}),
    ("sapo", {"tau_pos": 3.0, "tau_neg": 0.5, "kl_coef": 0.01, "sampler_cap": None}),
    ("stapo", {"tau_p": 0.5, "quantile_scope": "all", "kl_coef": 0.01}),
    ("stapo", {"tau_p": 0.5, "entropy_source": "old", "filter_groups": True}),
]


def declared(name: str) -> list:
    """The rows of this name in the test files of the methods: VARIANTS, LIMITS, GRADIENT_LIMITS."""
    files = sorted((Path(__file__).parent / "methods").glob("test_*.py"))
    modules = [importlib.import_module(f"tests.methods.{file.stem}") for file in files]
    return [row for module in modules for row in getattr(module, name, [])]


VARIANTS += declared("VARIANTS")
METHODS: list[tuple[str, dict]] = [(name, {}) for name in hapo.methods("policy")]
EVERY = [
    pytest.param(hapo.method(name, **options), id=name + "".join(f"-{k}={v}" for k, v in options.items()))
    for name, options in (*METHODS, *VARIANTS)
]

settings.register_profile("default", max_examples=40, deadline=None, derandomize=True, database=None)
settings.register_profile("nightly", settings.get_profile("default"), max_examples=200)
settings.load_profile(os.environ.get("HAPO_LAWS", "default"))
"""Batches that each law draws for each method: 40, or 200 with HAPO_LAWS=nightly; a fifth for option sets."""


def law(name: str, dtype: torch.dtype = torch.float32) -> Callable:
    """Run a check on random batches, for every method that does not say that it breaks the law."""

    def decorate(check: Callable) -> Callable:
        @pytest.mark.parametrize("method", [c for c in EVERY if name not in c.values[0].breaks])
        def test(method: hapo.Method, request: pytest.FixtureRequest) -> None:
            examples = settings().max_examples // (1 if request.node.callspec.id in hapo.methods("policy") else 5)

            @settings(max_examples=examples)
            @given(batch=batches(dtype), data=st.data())
            def run(batch, data):
                with shapes_checked(next(count) < SHAPE_CHECKED):
                    check(method, batch, data)

            count = itertools.count()
            run()

        test.__doc__ = check.__doc__
        return test

    return decorate


SHAPE_CHECKED = 5
"""Batches of each law on which jaxtyping checks every call; it takes most of the time."""


@contextmanager
def shapes_checked(on: bool) -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", not on)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


every_method = pytest.mark.parametrize("method", EVERY)


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
    old = -10 * rand(b, t).square()  # one in five rarer than STAPO's 0.002
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
        rewards=(rand(b, 2) * 3).round(),
    )


def gradient(method: hapo.Method, batch: hapo.TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and d loss / d logp of the whole batch as one step."""
    loss = method.loss(one_step(method, batch)).loss
    (grad,) = torch.autograd.grad(loss, batch.logp)
    return loss.detach(), grad


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> None:
    # An old-policy ratio of e^20 makes large numbers: relative to them float32 has six digits.
    torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=tolerance)


@law("split")
def test_split(method, batch, data):
    prepared = one_step(method, batch)
    whole = method.loss(prepared)
    (grad,) = torch.autograd.grad(whole.loss, batch.logp)
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
    same(total.detach(), whole.loss.detach())
    same(pieces, grad)
    for k, v in metrics.items():
        same(v, whole.metrics[k])


@law("")
def test_an_optimiser_step_of_its_own_counts_its_own_rows(method, batch, data):
    prepared = one_step(method, batch)
    cut = data.draw(st.integers(0, len(batch)))
    first, rest = (method.step(prepared.rows(rows)) for rows in (slice(0, cut), slice(cut, None)))
    assert first.totals == first.count()
    assert first.totals.tokens + rest.totals.tokens == prepared.totals.tokens
    assert first.totals.sequences + rest.totals.sequences == prepared.totals.sequences
    assert torch.equal(first.advantage, prepared.advantage[:cut])


@law("split")
def test_row_order_and_padding_width(method, batch, data):
    loss, grad = gradient(method, batch)
    order = torch.tensor(data.draw(st.permutations(range(len(batch)))), dtype=torch.long)
    shuffled = batch.rows(order)
    wide = shuffled.replace(
        **{
            f.name: torch.cat([v, v.new_full((len(batch), 3), fill)], 1)
            for f in dataclasses.fields(batch)
            if isinstance(v := getattr(shuffled, f.name), torch.Tensor) and v.ndim == 2 and f.name != "rewards"
            for fill in [False if v.dtype == torch.bool else float("nan")]
        }
    )
    wide = wide.replace(logp=wide.logp.detach().requires_grad_())
    loss2, grad2 = gradient(method, wide)
    same(loss2, loss)
    same(grad2[:, :-3], grad[order])
    assert (grad2[:, -3:] == 0).all()


@law("mask")
def test_mask(method, batch, data):
    garbage = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e30]))
    loss, grad = gradient(method, batch)
    poison = {
        name: torch.where(batch.mask, value, garbage)
        for name in TOKEN_FIELDS
        if (value := getattr(batch, name)) is not None
    }
    poison["logp"] = poison["logp"].detach().requires_grad_()
    loss2, grad2 = gradient(method, batch.replace(**poison))
    assert torch.equal(loss, loss2)
    assert torch.equal(grad, grad2)


@law("mask")
def test_a_row_that_could_not_be_scored_is_out_of_everything(method, batch, data):
    """NaN rewards leave the loss of the others, as if their rows were not there."""
    scored = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=len(batch), max_size=len(batch))), dtype=torch.bool
    )
    poisoned = batch.replace(reward=batch.reward.masked_fill(~scored, torch.nan))
    loss, grad = gradient(method, poisoned)
    others = batch.rows(scored.nonzero().squeeze(-1))
    others = others.replace(logp=others.logp.detach().requires_grad_())
    expected, grad_of_others = gradient(method, others)
    same(loss, expected)
    same(grad[scored], grad_of_others)
    assert (grad[~scored] == 0).all()


@law("", torch.float64)
def test_detach(method, batch, data):
    """The one gradient path is logp, and it is the derivative of the loss with all else frozen.

    Where a stop-gradient inside the loss makes it no derivative ("detach" in `breaks`), the first half holds.
    """
    alive = {
        name: getattr(batch, name).detach().requires_grad_()
        for name in TOKEN_FIELDS
        if getattr(batch, name) is not None
    }
    batch = batch.replace(**alive)
    loss = method.loss(one_step(method, batch)).loss
    grads = torch.autograd.grad(loss, list(alive.values()), allow_unused=True)
    for name, grad in zip(alive, grads, strict=True):
        if name != "logp":
            assert grad is None or (grad == 0).all(), name
    if "detach" in method.breaks:
        return
    prepared, step = one_step(method, batch), 1e-6
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


@law("edges")
def test_edges_are_finite(method, batch, data):
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
        rewards=torch.tensor([[0.1, 0.5], [0.1, 0.5], [0.7, 0.0]]),
        group=torch.tensor([0, 0, 1]),
    )
    prepared = one_step(method, batch)
    assert (prepared.advantage[:2] == 0).all()
    alone = 0.7 if method.options.get("singleton") == "reward" and not method.filter_groups else 0.0
    assert prepared.advantage[2].tolist() == pytest.approx([alone, alone], rel=2e-6)  # over 1 + 1e-6


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
            rewards=convert((torch.arange(24).reshape(12, 2) % 5).to(dtype)),
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


DAPO = ("dapo", {"filter_groups": False})
GRPO = ("grpo", {"kl_coef": 0.0})
OVER_TOKENS = {"reduce": token_mean}
WITHOUT_DIVISIONS = {
    "advantage": Stage(group_advantage, "reward", "group", "mask", scale="none"),
    "reduce": partial(sequence_sum, constant=3000.0),
}
UNBOUNDED = {"eps_low": 1 - 1e-5, "eps_high": 1e9}
LIMITS = [
    (
        ("archer", {"kl_coef": 0.04, "kl_reasoning": 0.04, "eps_reasoning": 0.2}),
        ("grpo", {}, OVER_TOKENS),
    ),
    (("archer", {"kl_coef": 0.0, "eps_reasoning": 0.2}), (*GRPO, OVER_TOKENS)),
    (("dapo", {}), ("grpo", {"kl_coef": 0.0, "eps_high": 0.28, "filter_groups": True}, OVER_TOKENS)),
    (("dr_grpo", {}), (*GRPO, WITHOUT_DIVISIONS)),
    (("edge_grpo", {"clamp": (1.0, 1.0)}), GRPO),
    (("entropy_adv", {"alpha": 0.0}), DAPO),
    (("forking_tokens", {"rho": 1.0}), ("dapo", {})),
    (("hapo", {"components": ""}), ("dapo", {})),
    (("hapo", {"components": "A"}), ("dapo", {"temperature": {"tau": 0.1}})),
    (("hapo", {"components": "", "variant": "release"}), ("dapo", {"eps_high": 0.2, "dual_clip": 10.0})),
    (("hapo", {"components": "ACD", "alpha": 0.0, "beta": 0.0}), ("dapo", {"temperature": {"tau": 0.1}})),
    (("stapo", {"tau_p": 0.0}), DAPO),
]
"""One method with options is another, with stages replaced: loss and gradient agree bit for bit."""
EVERY_LIMIT = [*LIMITS, *declared("LIMITS")]


def built(name: str, options: dict, replaced: dict | None = None) -> hapo.Method:
    return hapo.method(name, **options).replace(**(replaced or {}))


@pytest.mark.parametrize(("one", "other"), EVERY_LIMIT, ids=[a[0] + "-".join(a[1]) for a, _ in EVERY_LIMIT])
@given(batch=batches())
def test_limits(one, other, batch):
    a, b = built(*one), built(*other)
    p, q = one_step(a, batch), one_step(b, batch)
    assert torch.equal(p.advantage, q.advantage)
    assert (a.temperature_rule is None, p.stats) == (b.temperature_rule is None, q.stats) or one[1].get(
        "components"
    ) == ""
    out, reference = a.loss(p), b.loss(q)
    for name in ("ratio", "advantage", "low", "high", "clipped"):
        assert torch.equal(out.tokens[name], reference.tokens[name]), name
    assert torch.equal(out.loss, reference.loss)
    gradients = [torch.autograd.grad(o.loss, batch.logp)[0] for o in (out, reference)]
    assert torch.equal(*gradients)


GRADIENT_LIMITS = [
    (("aspo", {}), ("grpo", {"kl_coef": 0.001}), on_policy),
    (("ce_gppo", {"beta1": 0.0, "beta2": 0.0}), (*GRPO, OVER_TOKENS), unclamped),
    (("cispo", {"is_weight_cap": 1e9, "trust_region": (0.2, 0.28)}), ("dapo", {}), unclamped),
    (
        ("grpo_s", {"beta2": 0.0}, {"ratio": Stage(sequence_ratio, "logp", "old_logp", "mask")}),
        ("gspo", {"eps_low": 0.2, "eps_high": 0.28}),
        right_or_wrong,
    ),
    (("gspo", {"eps_low": 0.2, "eps_high": 0.2}), GRPO, one_token),
    (("gtpo", {}), ("grpo_s", {}), one_token),
    (("rloo", {}), ("rloo", {"clip": (0.2, 0.2)}), on_policy),
    (("sapo", {}), GRPO, on_policy),
    (("sapo", {"tau_pos": 1e-7, "tau_neg": 2e-7}), ("grpo", {"kl_coef": 0.0, **UNBOUNDED}), unclamped),
]
"""The same up to rounding, and for the gradient alone: values differ where a surrogate holds a stop-gradient."""
EVERY_GRADIENT_LIMIT = [*GRADIENT_LIMITS, *declared("GRADIENT_LIMITS")]


@pytest.mark.parametrize(
    ("one", "other", "where"), EVERY_GRADIENT_LIMIT, ids=[a[0] for a, _, _ in EVERY_GRADIENT_LIMIT]
)
@given(batch=batches())
def test_limits_of_the_gradient(one, other, where, batch):
    batch = where(batch)
    same(*(gradient(built(*spec), batch)[1] for spec in (one, other)))


@given(batch=batches())
def test_rloo_is_dr_grpo_times_n_over_n_minus_one(batch):
    rloo, dr_grpo = hapo.method("rloo", clip=(0.2, 0.2)), hapo.method("dr_grpo", length_limit=1)
    n = (batch.group[:, None] == batch.group).sum(1, keepdim=True)
    same(rloo.prepare(batch).advantage, dr_grpo.prepare(batch).advantage * n / (n - 1).clamp_min(1))
    for x, y in zip(
        gradient(rloo.replace(advantage=dr_grpo.advantage), batch), gradient(dr_grpo, batch), strict=True
    ):
        assert torch.equal(x, y)


@every_method
def test_bounds_are_recorded_where_the_method_has_any(method):
    batch = ordinary()
    high = method.loss(one_step(method, batch)).tokens["high"]
    assert (high < torch.inf).all() if "bounds" in method.stages else (high == torch.inf).all()


@pytest.mark.parametrize(("drawn", "weight"), [(1.5, 1.5), (0.5, 0.5), (8.0, 2.0)])
@pytest.mark.parametrize("name", [name for name in hapo.methods("policy") if hapo.method(name).sampler_cap])
def test_the_sampler_s_weight_scales_the_surrogate(name, drawn, weight):
    """Every token `drawn` times likelier under the policy than where it was drawn: min(drawn, 2) times the gradient."""
    method, batch = hapo.method(name, kl_coef=0.0), ordinary()
    _, plain = gradient(method, batch.replace(sampler_logp=None))
    _, weighted = gradient(method, batch.replace(sampler_logp=batch.old_logp - math.log(drawn)))
    assert plain.abs().max() > 0
    same(weighted, weight * plain)


def test_every_method_has_a_limit():
    pairs = [*EVERY_LIMIT, *EVERY_GRADIENT_LIMIT, (("rloo", {}), ("dr_grpo", {}))]
    assert {spec[0] for pair in pairs for spec in pair[:2]} == {*hapo.methods("policy")}


def ordinary() -> hapo.TokenBatch:
    """Eight responses of up to 12 tokens, ratios between 0.7 and 1.4, in float64."""
    g = torch.Generator().manual_seed(0)

    def rand(scale: float) -> torch.Tensor:
        return scale * torch.rand(8, 12, generator=g, dtype=torch.float64)

    old = -rand(2)
    return hapo.TokenBatch(
        mask=torch.arange(12) < torch.tensor([12, 3, 7, 12, 5, 9, 12, 4])[:, None],
        old_logp=old,
        logp=(old + rand(0.7) - 0.35).requires_grad_(),
        ref_logp=old - rand(0.5),
        sampler_logp=old + rand(0.6) - 0.3,
        old_entropy=rand(2),
        entropy=rand(2),
        reward=torch.tensor([1.0, 0, 1, 0, 0, 1, 1, 0], dtype=torch.float64),
        rewards=torch.tensor([[1.0, 0, 1, 0, 0, 1, 1, 0], [2, 3, 1, 1, 5, 0, 0, 1]], dtype=torch.float64).T,
        group=torch.arange(8) // 4,
    )


def breach_of_split(method: hapo.Method) -> float:
    """Relative change of the gradient when the batch is cut in two, or padded."""
    batch = ordinary()
    _, whole = gradient(method, batch)
    prepared = one_step(method, batch)
    halves = sum(method.loss(prepared.rows(rows)).loss for rows in (slice(0, 4), slice(4, 8)))
    (split,) = torch.autograd.grad(halves, batch.logp)
    pad = {
        name: torch.nn.functional.pad(value.detach(), (0, 3))
        for name in ("mask", *TOKEN_FIELDS)
        if (value := getattr(batch, name)) is not None
    }
    wide = batch.replace(**pad)
    wide = wide.replace(logp=wide.logp.requires_grad_())
    _, padded = gradient(method, wide)
    return max(((g - whole).norm() / whole.norm()).item() for g in (split, padded[:, :12]))


def breach_of_detach(method: hapo.Method) -> float:
    """Distance of the gradient from the derivative of the loss, along random directions, relative to it."""
    batch, step = ordinary(), 1e-6
    prepared = one_step(method, batch)
    _, analytic = gradient(method, batch)
    g = torch.Generator().manual_seed(1)
    breaches = []
    for _ in range(3):
        way = torch.randn(analytic.shape, generator=g, dtype=torch.float64)
        up, down = (method.loss(prepared.replace(logp=batch.logp.detach() + s * way)).loss for s in (step, -step))
        breaches.append(abs((up - down) / (2 * step) - (analytic * way).sum()).item())
    return max(breaches) / analytic.norm().item()


@every_method
def test_a_law_is_broken_just_where_the_method_says_so(method):
    broken = {
        name
        for name, breach in (("split", breach_of_split), ("detach", breach_of_detach))
        if breach(method) > (1e-3 if name == "detach" else 1e-6)
    }
    assert broken == method.breaks


def test_the_release_statistics_break_the_split_law():
    """How much the authors' choices cost, on one batch of 8 responses cut in two."""
    release = hapo.method("hapo", variant="release", entropy_source="current")
    assert breach_of_split(release) < 1e-6

    def of_these_rows(batch: Record) -> torch.Tensor:
        return bounded_signal(batch.entropy, entropy_stats(batch.entropy, batch.mask), "release")

    assert breach_of_split(release.replace(signal=of_these_rows)) > 0.02
    assert breach_of_split(hapo.method("archer", variant="release", kl_coef=0.1)) > 5e-4
