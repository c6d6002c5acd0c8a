"""The laws with rewards per token, on every policy method: few and tiny batches."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hapo
from hapo.batch import TOKEN_FIELDS
from hapo.parts.credit import last_token, position_returns
from tests.examples import one_step
from tests.test_laws import batches, gradient, same

OPTIONS: list[tuple[str, dict]] = [
    *((name, {}) for name in hapo.methods("policy")),
    ("dapo", {"gamma": 0.9, "scale_rewards": "batch", "temperature": {"tau": 0.1}}),
    ("dr_grpo", {"finished": "out", "length_limit": 7, "singleton": "reward"}),
    ("edge_grpo", {"clamp": (0.1, 10.0), "finished": "out"}),
    ("espo", {"baseline": "mean", "scale_rewards": "group"}),
    ("grpo_s", {"variant": "joint", "finished": "out", "singleton": "reward"}),
    ("gspo", {"form": "token", "eps_low": 0.2, "eps_high": 0.28}),
    ("gtpo", {"variant": "own", "gamma": 0.9, "singleton": "reward"}),
    ("hapo", {"variant": "release", "finished": "out"}),
    ("rloo", {"kl_coef": 0.05, "clip": (0.2, 0.2)}),
    ("vespo", {"finished": "out", "gamma": 0.5}),
    ("grpo", {"advantage": "turn_reward"}),
    ("dapo", {"advantage": "turn_reward", "finished": "out", "gamma": 0.9, "scale_rewards": "batch"}),
    ("gspo", {"advantage": "turn_reward", "finished": "out", "scale_rewards": "none"}),
]
ids = [name + "".join(f"-{k}={v}" for k, v in options.items()) for name, options in OPTIONS]
every = pytest.mark.parametrize(
    "method", [hapo.method(name, **{"advantage": "token_reward", **options}) for name, options in OPTIONS], ids=ids
)
few = settings(max_examples=4)


@st.composite
def token_batches(draw) -> hapo.TokenBatch:
    """Rewards on about half of the tokens; `reward` is their sum, or the caller's where a row has no tokens."""
    batch = draw(batches())
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    drawn = torch.randint(-4, 5, batch.mask.shape, generator=g) / 4
    drawn = torch.where(torch.rand(batch.mask.shape, generator=g) < 0.5, drawn, 0.0)
    return batch.replace(token_reward=drawn, reward=torch.where(batch.mask, drawn, 0.0).sum(-1))


def fresh(batch: hapo.TokenBatch, **changes) -> hapo.TokenBatch:
    """Other values, and a gradient of its own."""
    changed = batch.replace(**changes)
    return changed.replace(logp=changed.logp.detach().clone().requires_grad_())


@pytest.mark.parametrize("name", hapo.methods("policy"))
@few
@given(batch=batches())
def test_rewards_on_the_last_token_alone_are_the_outcome(name, batch):
    """Limit: advantage, loss and gradient bit for bit, whatever the lengths; garbage where masked."""
    outcome, by_token = hapo.method(name), hapo.method(name, advantage="token_reward")
    on_last = torch.where(batch.mask, 0.0, torch.nan)
    on_last = torch.where(last_token(batch.mask), batch.reward.unsqueeze(1), on_last)
    one, other = one_step(outcome, batch), one_step(by_token, batch.replace(token_reward=on_last))
    assert torch.equal(one.advantage, other.advantage)
    losses = outcome.loss(one).loss, by_token.loss(other).loss
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, batch.logp)[0] for loss in losses))


@every
@few
@given(batch=token_batches(), data=st.data())
def test_split_order_and_padding(method, batch, data):
    prepared = one_step(method, batch)
    loss = method.loss(prepared).loss
    (grad,) = torch.autograd.grad(loss, batch.logp)
    order = torch.tensor(data.draw(st.permutations(range(len(batch)))), dtype=torch.long)
    cut = data.draw(st.integers(0, len(batch)))
    parts = [method.loss(prepared.rows(rows)).loss for rows in (order[:cut], order[cut:])]
    same(sum(parts).detach(), loss.detach())
    same(sum(torch.autograd.grad(part, batch.logp)[0] for part in parts), grad)
    shuffled = batch.rows(order)
    wide = {
        f.name: torch.cat([v, v.new_full((len(batch), 2), False if v.dtype == torch.bool else math.nan)], 1)
        for f in dataclasses.fields(batch)
        if isinstance(v := getattr(shuffled, f.name), torch.Tensor) and v.ndim == 2 and f.name != "rewards"
    }
    loss2, grad2 = gradient(method, fresh(shuffled, **wide))
    same(loss2, loss.detach())
    same(grad2[:, :-2], grad[order])


@every
@few
@given(batch=token_batches(), garbage=st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_mask(method, batch, garbage):
    loss, grad = gradient(method, batch)
    given = {name: value for name in TOKEN_FIELDS if (value := getattr(batch, name)) is not None}
    poison = {name: torch.where(batch.mask, value.detach(), garbage) for name, value in given.items()}
    loss2, grad2 = gradient(method, fresh(batch, **poison))
    assert torch.equal(loss, loss2)
    assert torch.equal(grad, grad2)
    assert loss.isfinite()
    assert grad.isfinite().all()


@every
@few
@given(batch=token_batches(), data=st.data())
def test_a_row_with_a_token_that_could_not_be_scored_is_out_of_everything(method, batch, data):
    rows = batch.mask.any(-1)
    draw = st.lists(st.booleans(), min_size=len(batch), max_size=len(batch))
    lost = torch.tensor(data.draw(draw), dtype=torch.bool) & rows
    poisoned = torch.where(last_token(batch.mask) & lost.unsqueeze(1), torch.nan, batch.token_reward)
    loss, grad = gradient(method, fresh(batch, token_reward=poisoned))
    expected, others = gradient(method, fresh(batch.rows((~lost).nonzero().squeeze(-1))))
    same(loss, expected)
    same(grad[~lost], others)
    assert (grad[lost] == 0).all()


@every
@few
@given(batch=token_batches())
def test_the_reward_is_the_sum_where_it_is_not_given(method, batch):
    """Rows without tokens have none, and count with 0."""
    alone = fresh(batch, reward=None)
    given = fresh(batch, reward=torch.where(batch.mask, batch.token_reward, 0.0).sum(-1))
    assert torch.equal(method.prepare(alone).reward, method.prepare(given).reward)
    for one, other in zip(gradient(method, alone), gradient(method, given), strict=True):
        assert torch.equal(one, other)


def batch_of(token_reward: list[list[float]], group: list[int]) -> hapo.TokenBatch:
    """NaN is padding; ratios of 1, one entropy."""
    rewards = torch.tensor(token_reward)
    flat = torch.full_like(rewards, -0.7)
    return hapo.TokenBatch(
        mask=~rewards.isnan(),
        old_logp=flat,
        logp=flat.clone().requires_grad_(),
        ref_logp=flat,
        old_entropy=-flat,
        entropy=-flat,
        token_reward=rewards,
        group=torch.tensor(group),
    )


@every
def test_equal_returns_and_groups_of_one(method):
    """Equal at each position: advantage 0, and so of a group of one; its returns with singleton "reward"."""
    prepared = one_step(method, batch_of([[0.5, -0.25], [0.5, -0.25], [0.25, 0.5]], [0, 0, 1]))
    assert (prepared.advantage[:2] == 0).all()
    lone = [0.0, 0.0]
    if method.options["singleton"] == "reward" and not method.filter_groups:
        lone = [0.25 + method.options["gamma"] * 0.5, 0.5]
    assert prepared.advantage[2].tolist() == pytest.approx(lone, rel=2e-6)


def test_a_token_earns_what_comes_after_it():
    """Dr. GRPO: returns [1, 1, 0] and [1, 0, 0] against their mean at each position: the outcomes are equal, and the
    second token of the first response is what its group lacks."""
    batch = batch_of([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], [0, 0])
    assert hapo.method("dr_grpo").prepare(batch).advantage.tolist() == [[0, 0, 0], [0, 0, 0]]
    advantage = hapo.method("dr_grpo", advantage="token_reward").prepare(batch).advantage
    assert advantage.tolist() == [[0, 0.5, 0], [0, -0.5, 0]]


def test_finished_rows_stand_with_their_last_return_or_not_at_all():
    batch = batch_of([[0.0, 1.0], [3.0, math.nan]], [0, 0])
    last = hapo.method("dr_grpo", advantage="token_reward").prepare(batch).advantage
    assert last.tolist() == [[-1, -1], [1, 0]]
    out = hapo.method("dr_grpo", advantage="token_reward", finished="out").prepare(batch).advantage
    assert out.tolist() == [[-1, 0], [1, 0]]


def test_rloo_s_penalty_enters_token_by_token():
    """R_t = r_t - 0.5 (old - ref), returns of that, against those of the other response."""
    batch = batch_of([[0.0, 1.0], [0.0, 0.0]], [0, 0])
    batch = batch.replace(ref_logp=batch.old_logp - torch.tensor([[0.2, 0.4], [0.0, 0.0]]))
    method = hapo.method("rloo", advantage="token_reward", kl_coef=0.5)
    assert method.prepare(batch).advantage.tolist() == [
        pytest.approx([0.7, 0.8], abs=1e-6),
        pytest.approx([-0.7, -0.8], abs=1e-6),
    ]
    assert method.stages["credit"].startswith("penalised_returns(token_reward, reward, mask, old_logp, ref_logp")


def test_one_ratio_a_response_learns_the_mean_of_its_tokens_advantages():
    """GSPO shares one ratio: its gradient is the same on all tokens; that of GSPO-token is each one's own."""
    batch = batch_of([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], [0, 0])
    options = {"advantage": "token_reward", "scale_rewards": "none"}
    _, shared = gradient(hapo.method("gspo", **options), batch)
    _, own = gradient(hapo.method("gspo", **options, form="token"), batch)
    advantage = hapo.method("gspo", **options).prepare(batch).advantage
    same(own, -advantage / 6)
    same(shared, (-advantage / 6).mean(-1, keepdim=True).expand_as(own))


def test_filter_goes_by_the_sum():
    equal = batch_of([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], [0, 0, 1, 1])
    kept = hapo.method("dapo", advantage="token_reward").prepare(equal).mask.any(-1)
    assert kept.tolist() == [False, False, True, True]


def test_half_precision_rewards():
    batch = batch_of([[0.1, 0.7, -0.3], [0.2, 0.3, math.nan]], [0, 0])
    half = batch.replace(token_reward=batch.token_reward.half())
    exact = batch.replace(token_reward=half.token_reward.double())
    method = hapo.method("grpo", advantage="token_reward")
    one, other = method.prepare(half), method.prepare(exact)
    assert (one.advantage.dtype, one.token_reward.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(one.advantage.double(), other.advantage.double(), rtol=0, atol=1e-5)


def test_what_is_missing_or_cannot_be_is_named():
    batch = batch_of([[0.0, 1.0]], [0])
    without = batch.replace(token_reward=None, reward=torch.zeros(1))
    with pytest.raises(
        ValueError, match="reads TokenBatch.token_reward, and it is missing: the reward of each token"
    ):
        hapo.method("grpo", advantage="token_reward").prepare(without)
    with pytest.raises(
        ValueError, match="reads TokenBatch.reward, and it is missing.*token_reward gives it as its sum"
    ):
        hapo.method("grpo").prepare(batch.replace(token_reward=None))
    with pytest.raises(ValueError, match="gamma must be at its default where the advantage is of outcomes"):
        hapo.method("grpo", gamma=0.9)
    with pytest.raises(ValueError, match="finished must be at its default"):
        hapo.method("hapo", finished="out")
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], got 1.5"):
        hapo.method("grpo", advantage="token_reward", gamma=1.5)
    with pytest.raises(ValueError, match="advantage must be 'outcome': normalize_then_sum"):
        hapo.method("grpo", advantage="token_reward", multi_objective_aggregation="normalize_then_sum")


def test_the_stage_is_a_part():
    method = hapo.method("hapo", advantage="token_reward", gamma=0.9)
    assert method.credit.part is position_returns
    assert method.stages["credit"] == "position_returns(token_reward, reward, mask, gamma=0.9)"
    assert "credit" not in hapo.method("hapo").stages
