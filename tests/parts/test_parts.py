"""Each part on hand-worked arrays, and at its borders."""

import math
from functools import partial

import pytest
import torch

from hapo.batch import StepTotals
from hapo.parts.advantage import (
    decoupled_advantage,
    group_advantage,
    leave_one_out_advantage,
    signed_advantage,
    token_group_advantage,
)
from hapo.parts.bounds import asymmetric_bounds, constant_bounds, gated_bounds
from hapo.parts.entropy import entropy_from_logits, entropy_signal, entropy_stats, masked_quantile, mean_entropy
from hapo.parts.penalty import k3
from hapo.parts.ratio import mean_ratio, sequence_ratio, token_ratio, truncated_correction
from hapo.parts.reduce import sequence_mean, sequence_sum, token_mean, valid_token_mean
from hapo.parts.select import mixed_groups, most_uncertain, not_spurious, on_policy
from hapo.parts.shaping import (
    entropy_shaped_reward,
    redistribute,
    relative_entropy,
    soft_overlong_punishment,
)
from hapo.parts.surrogate import (
    asymmetric_ratio,
    clipped_surrogate,
    clipped_weight,
    gradient_preserving,
    unclipped_surrogate,
)
from hapo.parts.temperature import bounded_factor, zscore_factor
from tests.examples import ENTROPY, close, padded

T = torch.tensor


def _stats():
    h = padded(ENTROPY)
    return h, ~h.isnan(), entropy_stats(h, ~h.isnan())


def test_signal_spans_minus_one_to_one_and_rises_with_entropy():
    h, mask, stats = _stats()
    order = h[mask].argsort()
    signal = entropy_signal(h, stats)[mask][order]
    assert (signal.diff() > 0).all()
    assert signal[0] == -1
    assert signal[-1] == 1
    n = int(mask.sum())
    assert (signal > 0).sum() == n - 1 - round(0.8 * (n - 1))
    assert (entropy_signal(h, stats, "release")[mask] >= 0).all()


def test_signal_does_not_change_with_the_unit_of_entropy():
    h, mask, stats = _stats()
    bits = h / math.log(2)
    torch.testing.assert_close(
        entropy_signal(bits, entropy_stats(bits, mask))[mask], entropy_signal(h, stats)[mask]
    )


@pytest.mark.parametrize(("n", "rank"), [(4, 2), (6, 4), (2, 1), (1, 0)])
def test_pivot_is_the_nearest_token_with_halves_to_even(n, rank):
    h = torch.arange(1.0, n + 1).unsqueeze(0)
    stats = entropy_stats(h, torch.ones(1, n, dtype=torch.bool))
    assert stats.pivot == pytest.approx(math.log(rank + 1), abs=1e-7)
    # rho (N - 1) = 2.5 goes to rank 2
    even = entropy_stats(T([[1.0, 2, 3, 4, 5, 6]]), torch.ones(1, 6, dtype=torch.bool), rho=0.5)
    assert even.pivot == pytest.approx(math.log(3), abs=1e-7)


def test_statistics_of_nothing_of_ties_and_of_the_floor():
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert entropy_stats(T([[1.0, 1, 1]]), ~mask) is None
    tied = entropy_stats(T([[0.7, 0.7, 0.7]]), mask)
    assert (entropy_signal(T([[0.7, 0.7, 0.7]]), tied) == 0).all()
    assert (bounded_factor(T([0.7]), tied, 0.1) == 1).all()
    floored = entropy_stats(T([[0.0, 1e-9, 2.0]]), mask, rho=0.5)
    assert floored.floored == pytest.approx(2 / 3)
    assert floored.h_min == 0  # the pivot itself sits on the floor


def test_temperature_rules_to_six_decimals():
    *_, stats = _stats()
    h = T([0.0, 0.02, 0.15, 0.9, 1.2, 2.0])
    for factor, expected in [
        (bounded_factor(h, stats, 0.1), [0.9, 0.915404, 0.960181, 1.0, 1.036027, 1.1]),
        (bounded_factor(h, stats, 0.05, "release"), [1.05, 1.042298, 1.019909, 1.0, 1.018014, 1.05]),
        (
            zscore_factor(h, stats, 0.1, low=-9.0, high=9.0),
            [-0.165680, 0.757725, 0.885963, 1.0, 1.018310, 1.050821],
        ),
    ]:
        torch.testing.assert_close(factor, T(expected), rtol=0, atol=1e-6)
    assert zscore_factor(h, stats, 0.1)[0] == T(0.1)


def test_entropy_from_logits():
    torch.testing.assert_close(entropy_from_logits(torch.zeros(8)), T(math.log(8)))
    assert entropy_from_logits(T([0.0, -math.inf, -math.inf])) == 0
    p = T([0.5, 0.25, 0.25]).double()
    logits = p.log() + 1000
    assert entropy_from_logits(logits).item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-6)
    assert entropy_from_logits(0.7 * logits, 0.7).item() == pytest.approx(1.0397207, abs=1e-5)


def test_token_group_advantage_is_balanced_over_the_tokens_of_a_group():
    mask = torch.arange(5) < T([5, 1, 2, 3])[:, None]
    group, reward = T([0, 0, 0, 1]), T([1.0, 0.0, 0.0, 1.0])
    a = token_group_advantage(reward, group, mask)
    p = 5 / 8  # share of right tokens
    assert a[0, 0].item() == pytest.approx(math.sqrt((1 - p) / p), abs=1e-5)
    assert a[1, 0].item() == pytest.approx(-math.sqrt(p / (1 - p)), abs=1e-5)
    assert a[:3].sum().item() == pytest.approx(0, abs=1e-5)
    assert (a[3] == 0).all()
    torch.testing.assert_close(token_group_advantage(3 * reward - 7, group, mask), a, rtol=1e-5, atol=1e-5)


def test_fallback_takes_the_group_advantage_of_the_whole_group():
    mask = torch.arange(60) < T([1, 60, 60, 2, 2])[:, None]
    reward, group = T([1.0, 0, 0, 1, 0]), T([0, 0, 0, 1, 1])
    by_group = group_advantage(reward, group, mask)
    by_token = token_group_advantage(reward, group, mask)
    assert by_token.max() > 5
    a = token_group_advantage(reward, group, mask, fallback_threshold=5.0)
    assert torch.equal(a[:3], by_group[:3])
    assert torch.equal(a[3:], by_token[3:])


def test_equal_rewards_that_do_not_average_exactly_have_advantage_zero():
    reward = torch.full((3,), 0.1)
    mask = torch.ones(3, 2, dtype=torch.bool)
    assert (group_advantage(reward, T([0, 0, 0]), mask) == 0).all()
    assert not mixed_groups(reward, T([0, 0, 0]), mask.any(-1)).any()


def test_mixed_groups_never_keeps_a_group_of_one():
    kept = mixed_groups(T([1.0, 0.0, 1.0]), T([0, 0, 1]), T([True, True, True]))
    assert kept.tolist() == [True, True, False]


def test_neutral_zone_is_closed_or_open():
    r = T([[0.75, 1.25, 1.2500001, 0.7499999]])
    a, h = torch.ones(1, 4), T([[-0.5, -0.5, 0.5, 0.5]])
    assert redistribute(a, r, h, 0.5, 0.5).tolist() == [[0.5, 0.5, 1.5, 1.5]]
    assert redistribute(a, r, h, 0.5, 0.5, closed=False).tolist() == [[1.0, 1.0, 1.5, 1.5]]


def test_redistribution_on_policy_spares_uncertain_tokens_and_silences_the_most_certain():
    a, h = T([[1.0, -1.0, 2.0]]), T([[0.8, -0.25, -1.0]])
    out = redistribute(a, torch.ones(1, 3), h, 0.2, 0.28)
    assert out.tolist() == [[1.0, -0.75, 0.0]]


def test_asymmetric_bounds_widen_one_side():
    low, high = asymmetric_bounds(T([[-1.0, -0.5, 0.0, 0.5, 1.0]]), 0.25, 0.5)
    assert low.tolist() == [[0.5, 0.375, 0.25, 0.25, 0.25]]
    assert high.tolist() == [[0.5, 0.5, 0.5, 0.75, 1.0]]


def test_a_ratio_on_the_bound_is_unclipped():
    ratio = T([[1.25, 1.26, 0.75, 0.74, 1.26, 0.74]]).requires_grad_()
    advantage = T([[1.0, 1.0, -1.0, -1.0, -1.0, 1.0]])
    out = clipped_surrogate(ratio, advantage, constant_bounds(ratio.detach(), 0.25, 0.25))
    assert out.loss.tolist()[0] == pytest.approx([-1.25, -1.25, 0.75, 0.75, 1.26, -0.74])
    (grad,) = torch.autograd.grad(out.loss.sum(), ratio)
    assert grad.tolist() == [[-1.0, 0.0, 1.0, 0.0, 1.0, -1.0]]
    assert out.clipped_high.tolist() == [[False, True, False, False, False, False]]
    assert out.clipped_low.tolist() == [[False, False, False, True, False, False]]


def test_dual_clip_caps_negative_advantages():
    ratio = T([[3.0, 3.5]]).requires_grad_()
    bounds = constant_bounds(ratio.detach(), 0.2, 0.2)
    out = clipped_surrogate(ratio, T([[-2.0, -2.0]]), bounds, dual_clip=3.0)
    assert out.loss.tolist() == [[6.0, 6.0]]
    (grad,) = torch.autograd.grad(out.loss.sum(), ratio)
    assert grad.tolist() == [[2.0, 0.0]]


def test_dual_clip_leaves_positive_advantages_alone():
    """Their loss is that of the upper bound however large the ratio is."""
    ratio = T([[1.1, 4.0, 50.0]])
    bounds = constant_bounds(ratio, 0.2, 0.2)
    plain, dual = (clipped_surrogate(ratio, T([[2.0] * 3]), bounds, c).loss for c in (None, 3.0))
    assert torch.equal(plain, dual)
    close(dual, [[-2.2, -2.4, -2.4]])


def test_a_log_ratio_beyond_20_is_clamped_without_a_gradient():
    logp = T([[0.0, -50.0, -0.1]]).requires_grad_()
    ratio = token_ratio(logp, T([[-50.0, 0.0, -0.2]]))
    close(ratio.detach().log(), [[20.0, -20.0, 0.1]], atol=1e-5)
    (grad,) = torch.autograd.grad(ratio.sum(), logp)
    close(grad, [[0.0, 0.0, math.exp(0.1)]], atol=1e-5)


def test_ratio_and_correction_are_guarded():
    assert token_ratio(T([[60.0]]), T([[0.0]])).item() == pytest.approx(math.exp(20))
    weight = truncated_correction(T([[0.0, 0.0, -5.0]]), T([[-3.0, 0.1, 0.0]]), cap=2.0)
    assert weight[0].tolist() == pytest.approx([2.0, math.exp(-0.1), math.exp(-5)])


def test_k3_is_zero_only_at_the_reference():
    logp = T([[0.0, 0.5, -0.5]]).requires_grad_()
    kl = k3(logp, torch.zeros(1, 3))
    assert kl[0, 0] == 0
    assert (kl[0, 1:] > 0).all()
    (grad,) = torch.autograd.grad(kl.sum(), logp)
    assert grad[0].tolist() == pytest.approx([0.0, 1 - math.exp(-0.5), 1 - math.exp(0.5)], abs=1e-6)


def test_overlong_punishment_falls_between_its_borders_and_stays_beyond_them():
    lengths = T([0, 4, 6, 8, 9, 40])
    assert soft_overlong_punishment(lengths, 8, 4).tolist() == [0.0, 0.0, -0.5, -1.0, -1.0, -1.0]


def test_overlong_punishment_refuses_a_buffer_that_does_not_fit():
    with pytest.raises(ValueError, match="between 1 and max_length = 8, got 9"):
        soft_overlong_punishment(T([3]), 8, 9)


def test_masked_quantile():
    """Linear between order statistics, and that order statistic itself where the level falls on one."""
    x = padded([[3.0, 1.0, 2.0, 5.0], [7.0], []])
    mask = ~x.isnan()
    for level, expected in ((0.0, [1.0, 7.0]), (0.5, [2.5, 7.0]), (0.75, [3.5, 7.0]), (1.0, [5.0, 7.0])):
        out = masked_quantile(x, mask, level)[:, 0]
        assert out[:2].tolist() == expected
        assert out[2].isnan()
    assert masked_quantile(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), 0.5).isnan().all()
    h = torch.arange(26.0).unsqueeze(0) / 26
    assert masked_quantile(h, h >= 0, 0.28).item() == h[0, 7].double()  # 0.28 x 25 = 7.000000000000001


def test_mean_entropy_of_a_response_without_tokens_is_zero():
    h = padded([[0.5, 1.5], []])
    assert mean_entropy(h, ~h.isnan()).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        (leave_one_out_advantage, [1.0, -1.0, 0.0]),
        (partial(group_advantage, scale="none"), [0.5, -0.5, 0.0]),
        (partial(group_advantage, std_eps=0.0), [math.sqrt(0.5), -math.sqrt(0.5), 0.0]),
        (partial(token_group_advantage, std_eps=0.0), [1.0, -1.0, 0.0]),
    ],
    ids=["leave one out", "centred", "z-score", "token z-score"],
)
@pytest.mark.parametrize(("singleton", "alone"), [("zero", 0.0), ("reward", 3.0)])
def test_advantage_of_a_group_of_one_and_of_two_with_an_unscored_row(advantage, expected, singleton, alone):
    reward, group, mask = T([3.0, 1.0, 0.0, math.nan]), T([7, -2, -2, -2]), torch.ones(4, 1, dtype=torch.bool)
    found = advantage(reward, group, mask, singleton=singleton)[:, 0].tolist()
    assert found == pytest.approx([alone, *expected], rel=2e-6)


@pytest.mark.parametrize(
    ("normalisation", "expected"),
    [
        ("padded", [1.154701, 0.218218, -1.091089]),
        ("own", [0.0, 0.707107, -0.707107]),
        ("joint", [1.059626, -0.132453, -0.927173]),
    ],
)
def test_signed_advantage(normalisation, expected):
    """A group of one right and two wrong responses, and a group of equal rewards, which has advantage 0."""
    shaped = T([[2.0], [-1.0], [-3.0], [1.1], [1.1 + 1e-6]], dtype=torch.float64)
    correct, group, mask = (
        T([True, False, False, True, True]),
        T([0, 0, 0, 1, 1]),
        torch.ones(5, 1, dtype=torch.bool),
    )
    out = signed_advantage(shaped, correct, group, mask, normalisation, std_eps=0.0)
    close(out.T, [[*expected, 0.0, 0.0]])


def test_gated_bounds_are_symmetric():
    low, high = gated_bounds(T([[0.0, 1.0]]), inside=0.5, outside=0.2)
    assert torch.equal(low, high)
    assert low.tolist() == [[pytest.approx(0.2), 0.5]]


@pytest.mark.parametrize(
    ("surrogate", "inside", "outside"),
    [
        (lambda logp, *rest: clipped_surrogate(*rest), [-1.25, 0.75], [0.0, 0.0]),
        (lambda logp, r, a, bounds: unclipped_surrogate(r, a), [-1.25, 0.75], [-1.5, 0.5]),
        (clipped_weight, [-1.25, 0.75], [-1.25, 0.75]),
        (partial(clipped_weight, trust_region=(0.25, 0.25)), [-1.25, 0.75], [0.0, 0.0]),
        (partial(gradient_preserving, beta1=0.5, beta2=2.0), [-1.25, 0.75], [-2.5, 0.375]),
        (partial(asymmetric_ratio, c_neg=3.0, c_pos=3.0), [-0.8, 0.75], [0.0, 0.0]),
    ],
    ids=["clipped", "unclipped", "weight", "trust region", "gradient-preserving", "asymmetric"],
)
def test_gradient_on_the_bounds_and_beyond(surrogate, inside, outside):
    """d loss / d logp at r = 1 + high with A = 1 and r = 1 - low with A = -1, where the ratio still counts."""
    bounds = constant_bounds(torch.zeros(1, 2), 0.25, 0.25)
    for ratio, expected in (([1.25, 0.75], inside), ([1.5, 0.5], outside)):
        logp = T([ratio], dtype=torch.float64).log().requires_grad_()
        # Exactly this ratio, with the gradient of exp(logp)
        r = T([ratio], dtype=torch.float64) * (logp - logp.detach()).exp()
        (grad,) = torch.autograd.grad(surrogate(logp, r, T([[1.0, -1.0]]).double(), bounds).loss.sum(), logp)
        assert grad[0].tolist() == pytest.approx(expected)


def test_asymmetric_caps_count_as_inside_at_the_cap_itself():
    ratio = T([[0.25, 4.0]])
    bounds = constant_bounds(ratio, 0.2, 0.2)
    on = asymmetric_ratio(ratio.log(), ratio, T([[1.0, -1.0]]), bounds, c_neg=4.0, c_pos=4.0)
    assert on.loss.tolist() == [[-4.0, 4.0]]


def test_sequence_ratios_of_padding_of_nothing_and_of_the_guard():
    logp = padded([[0.5, -0.1], [-0.4], [], [15.0, 15.0]], fill=3.0).requires_grad_()
    mask = T([[True, True], [True, False], [False, False], [True, True]])
    zero = torch.zeros_like(logp)
    geometric = sequence_ratio(logp, zero, mask)
    expected = [math.exp(0.2), math.exp(-0.4), 1.0, math.exp(10)]
    close(geometric / T(expected).unsqueeze(1), [[1.0, 1.0]] * 4)
    (grad,) = torch.autograd.grad(geometric[:, 0].sum(), logp)
    close(grad, [[math.exp(0.2) / 2] * 2, [math.exp(-0.4)], [0.0], [0.0]])
    (grad,) = torch.autograd.grad(sequence_ratio(logp, zero, mask, "token")[0, 0], logp)
    close(grad, [[math.exp(0.2), 0.0], [0.0], [0.0], [0.0]])
    arithmetic = mean_ratio(logp, zero, mask)[:, 0]
    assert arithmetic[:3].tolist() == pytest.approx([(math.exp(0.5) + math.exp(-0.1)) / 2, math.exp(-0.4), 0.0])
    (grad,) = torch.autograd.grad(arithmetic[:3].sum(), logp)
    close(grad, [[math.exp(0.5) / 2, math.exp(-0.1) / 2], [math.exp(-0.4)], [0.0], [0.0]])


def test_reductions():
    """Two responses and an empty one; a token of the first is valid and not kept."""
    loss = T([[1.0, 2.0, 6.0], [5.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    kept = T([[True, True, False], [True, False, False], [False, False, False]])
    totals = StepTotals(sequences=2, tokens=4, kept=3)
    assert token_mean(loss, kept, totals) == pytest.approx(8 / 3)
    assert valid_token_mean(loss, kept, totals) == 2
    assert sequence_mean(loss, kept, totals) == 3.25
    assert sequence_sum(loss, kept, totals, constant=8.0) == 0.5
    nothing = StepTotals(sequences=0, tokens=0, kept=0)
    for reduce in (token_mean, valid_token_mean, sequence_mean, sequence_sum):
        assert reduce(loss, torch.zeros_like(kept), nothing) == 0


def test_shaped_rewards_of_lone_tokens_and_of_certain_ones():
    h = padded([[0.7, 0.0, 0.0], [0.0, 0.0], [0.0, 1e-9, 0.3], [0.3]])
    correct, group = T([True, True, False, False]), torch.zeros(4, dtype=torch.long)
    shaped = entropy_shaped_reward(h, correct, group, ~h.isnan(), base=1.0, bonus=0.5)
    # All right ones certain: no bonus, also for a lone one; the certain wrong token takes the whole penalty
    close(shaped, [[2.0, 1.0, 1.0], [1.0, 1.0], [-2.0, -1.5, -1.5], [-1.0]])


def test_relative_entropy_counts_rows_with_tokens_only():
    h = padded([[0.2, 0.4], [0.9], []])
    relative = relative_entropy(h, torch.zeros(3, dtype=torch.long), ~h.isnan())
    close(relative[:2], [[0.5], [1.5]])


def test_choices_of_tokens_from_an_empty_batch():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    x = torch.full((2, 3), -9.0)
    assert not most_uncertain(x, nothing, 0.2).any()
    assert not not_spurious(x, x, -x, nothing, tau_p=0.002, q=0.75).any()


MASKED = {
    "reward": T([1.0, 1.0, 0.0, 0.0, 5.0]),
    "group": T([0, 0, 0, 0, 1]),
    "mask": T([[True, True], [True, False], [False, False], [False, False], [True, True]]),
}
"""Two right answers, two wrong ones that are masked for their length, and another prompt's only answer."""


def test_the_reward_of_a_masked_row_counts_in_its_group():
    """0.5 from the mean, over the deviation sqrt(1/3): TRL and verl give the same."""
    close(group_advantage(**MASKED), [[0.866024, 0.866024], [0.866024, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    close(group_advantage(**MASKED, scale="none")[:2], [[0.5, 0.5], [0.5, 0.0]])
    close(leave_one_out_advantage(**MASKED)[:2], [[2 / 3, 2 / 3], [2 / 3, 0.0]])
    assert (token_group_advantage(**MASKED) == 0).all()  # of all tokens of the group, none is a wrong answer's
    rows = mixed_groups(MASKED["reward"], MASKED["group"], torch.ones(5, dtype=torch.bool))
    assert rows.tolist() == [True] * 4 + [False]


def test_the_deviation_of_the_batch():
    """Over sd(1, 1, 0, 0, 5) = 2.073644: the lone answer's distance from its group is 0."""
    close(group_advantage(**MASKED, scale="batch")[:2], [[0.241121, 0.241121], [0.241121, 0.0]])
    assert (group_advantage(**MASKED, scale="batch")[4] == 0).all()


def test_rewards_normalised_apart_then_added_up():
    """First -+0.707106, second 1.154699 and -0.577350 twice of three; x over its own deviation of the batch."""
    rewards = T([[0.0, 4.0], [1.0, 1.0], [math.nan, 1.0], [math.nan, math.nan]])
    group, mask = T([3, 3, 3, 3]), torch.ones(4, 1, dtype=torch.bool)
    x = torch.tensor([-0.707106 + 2 * 1.154699, 0.707106 - 2 * 0.577349, -2 * 0.577349])
    expected = ((x - x.mean()) / (x.std() + 1e-6)).tolist()
    found = decoupled_advantage(rewards, group, mask, weights=(1.0, 2.0))[:, 0].tolist()
    assert found == pytest.approx([*expected, 0.0], abs=2e-6)
    with pytest.raises(ValueError, match="reward_weights has 3 numbers for 2 rewards"):
        decoupled_advantage(rewards, group, mask, weights=(1.0, 1.0, 1.0))


def test_the_off_policy_mask_drops_wrong_responses_that_the_policy_has_left():
    """Mean losses of log-prob 0.3, 0.3 and 0.1 at a threshold of 0.2; what stands at padding has no part."""
    drawn, logp = T([[-1.0, -1.0], [-1.0, -1.0], [-1.0, 50.0]]), T([[-1.5, -1.1], [-1.5, -1.1], [-1.1, 0.0]])
    advantage = T([[-1.0, -1.0], [1.0, 0.0], [-1.0, 0.0]])
    mask = T([[True, True], [True, True], [True, False]])
    kept = on_policy(logp, drawn, advantage, mask, 0.2)
    assert kept.tolist() == [[False, False], [True, True], [True, True]]
    assert on_policy(logp, drawn, advantage, mask, 0.3 + 1e-6).all()


def test_a_row_without_a_reward_is_in_no_group():
    reward = MASKED["reward"].clone()
    reward[2] = torch.nan
    # Mean 2/3, deviation sqrt(1/3) of three rewards.
    close(group_advantage(**{**MASKED, "reward": reward})[:3], [[0.577349, 0.577349], [0.577349, 0.0], [0.0, 0.0]])
    reward[1] = torch.nan
    close(leave_one_out_advantage(**{**MASKED, "reward": reward})[:2], [[1.0, 1.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("advantage", "alone"),
    [(group_advantage, 5 / (1 + 1e-6)), (token_group_advantage, 5 / (1 + 1e-6)), (leave_one_out_advantage, 5.0)],
)
def test_a_group_of_one_may_have_its_reward(advantage, alone):
    """verl takes mean 0 and deviation 1 there, to which it adds 1e-6."""
    double = {**MASKED, "reward": MASKED["reward"].double()}
    assert advantage(**double, singleton="reward")[4].tolist() == pytest.approx([alone] * 2, rel=1e-12)


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_signal_are_exact_whatever_the_default_dtype(default, dtype):
    entropy = torch.rand(4, 50, dtype=dtype, generator=torch.Generator().manual_seed(0)) + 0.01
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        stats = entropy_stats(entropy, torch.ones(4, 50, dtype=torch.bool))
        signal = entropy_signal(entropy, stats)
    finally:
        torch.set_default_dtype(before)
    assert signal.dtype == dtype
    assert (signal.max(), signal.min()) == (1, -1)
