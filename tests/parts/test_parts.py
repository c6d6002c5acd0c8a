"""Each part on hand-worked arrays: the checks that the specs list, and the borders."""

import math

import pytest
import torch

import hapo
from hapo.parts.advantage import group_advantage, token_group_advantage
from hapo.parts.bounds import asymmetric_bounds, constant_bounds
from hapo.parts.entropy import entropy_from_logits, entropy_signal, entropy_stats
from hapo.parts.keep import mixed_groups
from hapo.parts.penalty import k3
from hapo.parts.ratio import token_ratio, truncated_correction
from hapo.parts.shaping import redistribute, soft_overlong_punishment
from hapo.parts.surrogate import clipped_surrogate
from hapo.parts.temperature import bounded_factor, zscore_factor
from tests.examples import ENTROPY, padded

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


def test_temperature_laws_to_six_decimals():
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


def test_rows_without_tokens_are_in_no_group_mean():
    mask = T([[True], [True], [False]])
    a = group_advantage(T([1.0, 0.0, 100.0]), T([0, 0, 0]), mask)
    assert a[:, 0].tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5), 0.0], abs=1e-5)


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
    out = clipped_surrogate(ratio, T([[-2.0, -2.0]]), constant_bounds(ratio.detach(), 0.2, 0.2), dual_clip=3.0)
    assert out.loss.tolist() == [[6.0, 6.0]]
    (grad,) = torch.autograd.grad(out.loss.sum(), ratio)
    assert grad.tolist() == [[2.0, 0.0]]


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


def test_overlong_punishment_refuses_a_buffer_that_does_not_fit():
    with pytest.raises(ValueError, match="between 1 and max_length = 8, got 9"):
        soft_overlong_punishment(T([3]), 8, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 1.0}, "tau must be in .0, 1."),
        ({"tau": float("nan")}, "tau is NaN"),
        ({"t_min": 0.0}, "t_min must be"),
        ({"components": "ABE"}, "components must be made of the letters"),
        ({"eps_low": 1.2}, "eps_low must be"),
        ({"alpha": 4.0}, "alpha must be below 4"),
        ({"beta": 1.5}, "beta must be"),
        ({"dual_clip": 0.5}, "dual_clip must be > 1"),
        ({"eps_hihg": 0.3}, "did you mean 'eps_high'"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hapo.method("hapo", **options)


def test_unknown_method_gets_the_nearest_name():
    with pytest.raises(ValueError, match="there is no method 'hap0'; did you mean 'hapo'"):
        hapo.method("hap0")


def test_the_contract_is_checked_at_the_door():
    ok = {
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "old_logp": torch.zeros(2, 3),
        "reward": torch.zeros(2),
        "group": torch.zeros(2, dtype=torch.long),
    }
    batch = hapo.TokenBatch(**ok)
    with pytest.raises(ValueError, match="call method.prepare"):
        hapo.method("dapo").loss(batch)
    with pytest.raises(ValueError, match="set TokenBatch.old_entropy"):
        hapo.method("hapo").prepare(batch)
    with pytest.raises(ValueError, match="needs TokenBatch.logp"):
        hapo.method("dapo").loss(hapo.method("dapo").prepare(batch))
    with pytest.raises(ValueError, match="needs TokenBatch.ref_logp"):
        hapo.method("grpo").loss(hapo.method("grpo").prepare(batch.replace(logp=torch.zeros(2, 3))))
