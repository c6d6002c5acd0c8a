"""Rewards per token: returns, advantages, baselines, and the shaped reward of `dense_reward_shapes.md`."""

import math

import pytest
import torch

from hapo.parts.advantage import group_advantage, token_group_advantage
from hapo.parts.credit import (
    attribution_share,
    gae,
    group_baseline,
    kl_in_reward,
    last_token,
    position_returns,
    reward_to_go,
    shaped_reward,
)
from tests.examples import close

SHAP = [0.666667, 0.216667, 0.316667]
LIME = [0.870959, 0.394832, 0.390323]
WEIGHT = [0.5, 0.3, 0.2]
VALID = torch.ones(1, 3, dtype=torch.bool)
R = torch.tensor([1.4], dtype=torch.float64)
PHI = torch.tensor([[SHAP, LIME]], dtype=torch.float64)


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


# -- the spec's worked example ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phi", "how", "share"),
    [(SHAP, "sum", [0.555556, 0.180556, 0.263889]), (LIME, "softmax", [0.446514, 0.277367, 0.276119])],
)
def test_shares(phi, how, share):
    close(attribution_share(row(*phi), VALID, how), [share])


def test_shaped_reward():
    normalised = shaped_reward(R, PHI, WEIGHT, VALID)
    close(normalised, [[0.576425, 0.242883, 0.580692]])
    assert normalised.sum().item() == pytest.approx(1.4, abs=1e-12)
    additive = shaped_reward(R, PHI, WEIGHT, VALID, mode="additive")
    close(additive, [[0.594621, 0.226783, 0.555430]])
    assert additive.sum().item() == pytest.approx(1.376834, abs=1e-6)


def test_kl_in_the_reward_and_returns():
    logp = row(-0.5, -1.0, -0.25)
    penalised = kl_in_reward(
        shaped_reward(R, PHI, WEIGHT, VALID), logp, logp - row(0.1, -0.05, 0.2), VALID, beta=0.05
    )
    close(penalised, [[0.571425, 0.245383, 0.570692]])
    returns = reward_to_go(penalised, VALID)
    close(returns, [[1.387500, 0.816075, 0.570692]])
    assert returns[0, 0].item() == pytest.approx(1.4 - 0.05 * 0.25, abs=1e-12)  # r less the KL's total


# -- the spec's checks ------------------------------------------------------------------------------------------


def rows_of(b: int = 5, k: int = 3, t: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, attributions and masks of lengths 0 to 5, NaN at masked places."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(t) < torch.arange(b).unsqueeze(1)
    phi = torch.randn(b, k, t, generator=g, dtype=torch.float64)
    return torch.randn(b, generator=g, dtype=torch.float64), phi.masked_fill(~mask.unsqueeze(1), torch.nan), mask


HOW = ("sum", "softmax", "abs")


@pytest.mark.parametrize("weight", [[1, 0, 0, 0], [0, 0, 1, 0], [0.25, 0.25, 0.25, 0.25], [0, 0.7, 0, 0.3]])
def test_normalised_rewards_sum_to_the_reward(weight):
    reward, phi, mask = rows_of()
    shaped = shaped_reward(reward, phi, weight, mask, normalisation=HOW)
    torch.testing.assert_close(shaped.sum(-1)[1:], reward[1:], rtol=1e-9, atol=1e-9)
    assert (shaped[~mask] == 0).all()
    sparse = shaped_reward(reward, phi, [0, 0, 0, 1], mask, normalisation=HOW)
    difference = (shaped - sparse).cumsum(-1)  # the potential: shaping telescopes to 0 at the last token
    assert difference[:, -1].abs().max() < 1e-9
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize("mode", ["normalised", "additive"])
def test_the_sparse_vertex_is_the_outcome(mode):
    reward, phi, mask = rows_of()
    how = HOW if mode == "normalised" else None
    sparse = shaped_reward(reward, phi, [0, 0, 0, 1], mask, normalisation=how, mode=mode)
    assert torch.equal(sparse, torch.where(last_token(mask), reward.unsqueeze(1), 0.0))


@pytest.mark.parametrize("mode", ["normalised", "additive"])
def test_linear_in_the_weights(mode):
    reward, phi, mask = rows_of()
    how = HOW if mode == "normalised" else None
    one, other = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.6, 0.0, 0.4, 0.0]], dtype=torch.float64)

    def shaped(w: torch.Tensor) -> torch.Tensor:
        return shaped_reward(reward, phi, w, mask, normalisation=how, mode=mode)

    mixed = 0.3 * shaped(one) + 0.7 * shaped(other)
    torch.testing.assert_close(shaped(0.3 * one + 0.7 * other), mixed, rtol=0, atol=1e-12)


def test_additive_rewards_fall_short_by_what_is_not_explained():
    reward, phi, mask = rows_of()
    weight = torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=torch.float64)
    shaped = shaped_reward(reward, phi, weight, mask, mode="additive")
    unexplained = reward.unsqueeze(1) - phi.nan_to_num(0.0).sum(-1)
    expected = reward - (weight[:-1] * unexplained).sum(-1)
    torch.testing.assert_close(shaped.sum(-1)[1:], expected[1:], rtol=0, atol=1e-12)


def test_no_gradient_from_rewards():
    reward, phi, mask = rows_of()
    reward, phi = reward.requires_grad_(), phi.nan_to_num(0.0).requires_grad_()
    logp = torch.zeros(mask.shape, requires_grad=True)
    shaped = shaped_reward(reward, phi, [0.25] * 4, mask, normalisation=HOW)
    for made in (shaped, kl_in_reward(shaped, logp, logp - 1, mask, 0.1), reward_to_go(phi[:, 0], mask)):
        assert not made.requires_grad
    assert not gae(phi[:, 0], logp, mask).requires_grad
    assert not position_returns(phi[:, 0], reward.detach(), mask).requires_grad


# -- edge cases of the shaped reward ----------------------------------------------------------------------------


def test_one_token_has_the_whole_reward():
    phi = torch.tensor([[[-3.0], [0.0], [5.0]]])
    for weight in ([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]):
        shaped = shaped_reward(
            torch.tensor([0.7]), phi, weight, torch.ones(1, 1, dtype=torch.bool), normalisation=HOW
        )
        assert shaped.tolist() == [[pytest.approx(0.7)]]


def test_reward_zero():
    reward = torch.zeros(1, dtype=torch.float64)
    assert (shaped_reward(reward, PHI, WEIGHT, VALID) == 0).all()
    close(shaped_reward(reward, PHI, [1, 0, 0], VALID, mode="additive"), [SHAP])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["normalised", "additive"])
def test_an_attribution_that_is_not_finite_is_the_sparse_channel(mode, bad):
    phi = PHI.clone().repeat(2, 1, 1)
    phi[0, 0, 1] = bad
    shaped = shaped_reward(R.repeat(2), phi, [1, 0, 0], VALID.repeat(2, 1), mode=mode)
    assert shaped[0].tolist() == [0, 0, 1.4]
    assert shaped[1, 0] > 0.5
    at_padding = torch.tensor([[True, True, False]])
    phi = row(0.5, 1.5, bad).unsqueeze(1)
    close(shaped_reward(R, phi, [1, 0], at_padding, normalisation=["sum"]), [[0.35, 1.05, 0]])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_could_not_be_scored(bad):
    shaped = shaped_reward(torch.tensor([1.4, bad]), PHI.float().repeat(2, 1, 1), WEIGHT, VALID.repeat(2, 1))
    assert shaped[0].isfinite().all()
    assert shaped[1].isnan().all()


@pytest.mark.parametrize("how", ["sum", "abs"])
def test_a_sum_near_zero_is_spread_evenly(how):
    tiny = row(5e-9, -5e-9, 1e-9) if how == "abs" else row(0.5, -0.5, 5e-9)
    tiny = tiny / 2 if how == "abs" else tiny
    close(attribution_share(tiny, VALID, how), [[1 / 3, 1 / 3, 1 / 3]], atol=1e-12)
    assert attribution_share(row(0.0, 0.0, 0.0), VALID, how).tolist() == [[1 / 3] * 3]


def test_the_sum_is_unbounded_and_the_others_are_shares():
    nearly = row(1.0, -1.0, 1e-4)
    assert attribution_share(nearly, VALID, "sum").abs().max() > 9e3
    for how in ("softmax", "abs"):
        share = attribution_share(nearly, VALID, how)
        assert (share >= 0).all()
        assert share.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert attribution_share(row(1e5, 0.0, -1e5), VALID, "softmax").tolist() == [[1, 0, 0]]


def test_a_row_without_tokens_has_no_shares():
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    for how in HOW:
        assert attribution_share(row(1, 2, math.nan), nothing, how).tolist() == [[0, 0, 0]]
    assert shaped_reward(R, PHI, WEIGHT, nothing).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        ([0.5, 0.5], {}, "weight has 2 numbers for 2 attributions"),
        ([0.5, 0.6, 0.1], {}, "numbers >= 0 of sum 1, got .*of sum 1.2"),
        ([1.5, -0.5, 0.0], {}, "numbers >= 0 of sum 1"),
        ([math.nan, 0.5, 0.5], {}, "numbers >= 0 of sum 1"),
        (WEIGHT, {"normalisation": ["sum"]}, "normalisation has 1 names for 2 attributions"),
        (WEIGHT, {"normalisation": ["sum"] * 2, "mode": "additive"}, "normalisation must be None"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(weight, options, message):
    with pytest.raises(ValueError, match=message):
        shaped_reward(R, PHI, weight, VALID, **options)


# -- returns ----------------------------------------------------------------------------------------------------

NAN = math.nan
REWARDS = torch.tensor([[1.0, 2.0, 4.0, NAN], [3.0, NAN, 5.0, 7.0], [6.0, NAN, NAN, NAN], [NAN] * 4])
MASK = ~REWARDS.isnan()


def test_reward_to_go_skips_what_the_policy_did_not_write():
    close(reward_to_go(REWARDS, MASK), [[7, 6, 4, 0], [15, 0, 12, 7], [6, 0, 0, 0], [0] * 4])
    close(reward_to_go(REWARDS, MASK, gamma=0.5), [[3, 4, 4, 0], [7.25, 0, 8.5, 7], [6, 0, 0, 0], [0] * 4])
    close(reward_to_go(REWARDS, MASK, gamma=0.0), REWARDS.nan_to_num(0.0).tolist())
    assert reward_to_go(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)


def test_gae_by_hand():
    """r = [1, 2], V = [0.5, 1], gamma 0.9, lambda 0.8: d = [1.4, 1], A = [1.4 + 0.72, 1]."""
    reward, value = row(1, NAN, 2), row(0.5, NAN, 1)
    mask = ~reward.isnan()
    close(gae(reward, value, mask, gamma=0.9, lam=0.8), [[2.12, 0, 1]])
    close(gae(reward, value, mask, gamma=0.9, lam=0.0), [[1.4, 0, 1]])
    returns = reward_to_go(reward, mask, 0.9)
    close(gae(reward, value, mask, gamma=0.9), (returns - value.nan_to_num(0.0)).tolist())
    torch.testing.assert_close(gae(reward, torch.zeros(1, 3), mask), reward_to_go(reward, mask))


def test_group_baseline_over_the_rows_that_are_alive():
    returns = torch.tensor([[7.0, 6, 4], [3, 2, NAN], [5, NAN, NAN], [8, 1, NAN]])
    mask, group = ~returns.isnan(), torch.tensor([3, 3, 3, 9])
    close(group_baseline(returns, group, mask), [[5, 4, 4], [5, 4, 0], [5, 0, 0], [8, 1, 0]])
    others = group_baseline(returns, group, mask, leave_one_out=True)
    close(
        others, [[4, 2, 4], [6, 6, 0], [5, 0, 0], [8, 1, 0]]
    )  # alone: its own return, so that the advantage is 0
    unscored = returns.clone()
    unscored[1, 0] = NAN  # at a valid place: out of both columns
    close(group_baseline(unscored, group, mask), [[6, 6, 4], [0, 0, 0], [6, 0, 0], [8, 1, 0]])


def test_position_returns_of_finished_and_interrupted_rows():
    reward = torch.tensor([7.0, 15.0, 6.0, -1.0])
    held = position_returns(REWARDS, reward, MASK)
    close(held, [[7, 6, 4, 4], [15, 12, 12, 7], [6, 6, 6, 6], [-1] * 4])
    out = position_returns(REWARDS, reward, MASK, finished="out")
    assert torch.equal(out.isnan(), torch.tensor([[0, 0, 0, 1], [0] * 4, [0, 1, 1, 1], [0] * 4]).bool())
    close(out.nan_to_num(0.0), [[7, 6, 4, 0], [15, 12, 12, 7], [6, 0, 0, 0], [-1] * 4])
    lost = position_returns(REWARDS, torch.tensor([7.0, NAN, 6.0, NAN]), MASK)
    assert lost.isnan().all(-1).tolist() == [False, True, False, True]


def test_each_column_is_compared_by_itself():
    """Columns of `position_returns` through the parts: what the parts make of each column as rewards."""
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(5) < torch.tensor([5, 2, 0, 3, 4, 1]).unsqueeze(1)
    returns = position_returns(torch.randn(6, 5, generator=g), torch.randn(6, generator=g), mask, finished="out")
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    for part, options in (
        (group_advantage, {}),
        (group_advantage, {"scale": "batch"}),
        (group_advantage, {"singleton": "reward"}),
        (token_group_advantage, {"fallback_threshold": 1.2}),
    ):
        whole = part(returns, group, mask, **options)
        for t in range(5):
            assert torch.equal(whole[:, t], part(returns[:, t].contiguous(), group, mask, **options)[:, t])
