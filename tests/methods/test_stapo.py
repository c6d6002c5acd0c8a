"""STAPO: worked example with both scopes of the quantile, what is dropped and what never is."""

from itertools import pairwise

import pytest
import torch

import hapo
from hapo.parts.entropy import masked_quantile
from hapo.parts.select import not_spurious
from tests.examples import close, example, logs, loss_and_grad, on_tokens, one_step

T = torch.tensor

P = [[0.30, 0.0010, 0.85, 0.0015], [0.42, 0.0008, 0.70, 0.55], [0.0005, 0.92, 0.0018, 0.60], [0.25, 0.0012]]
P_OLD = [[0.28, 0.0008, 0.85, 0.0015], [0.50, 0.0009, 0.50, 0.50], [0.0005, 0.90, 0.0015, 0.40], [0.25, 0.0012]]
H = [[0.45, 0.02, 0.30, 1.80], [0.40, 0.05, 0.20, 0.35], [0.10, 0.25, 0.60, 0.15], [0.30, 0.01]]
GRAD = [
    [-0.084353, 0.0, -0.078729, -0.078729],
    [0.066133, 0.069982, 0.110221, 0.086602],
    [0.0, -0.080479, 0.0, 0.0],
    [0.078729, 0.078729],
]


def stapo_batch() -> hapo.TokenBatch:
    return example(old=logs(P_OLD), new=logs(P), entropy=H, reward=[1.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("options", "dropped", "loss"),
    [
        ({}, [(0, 1), (2, 0), (2, 2)], 0.067332),
        ({"quantile_scope": "all", "q": 0.8}, [(0, 1), (2, 0)], -0.024881),
        ({"tau_p": 0.0}, [], -0.160509),
    ],
)
def test_stapo(options, dropped, loss):
    batch, method = stapo_batch(), hapo.method("stapo", **options)
    prepared = one_step(method, batch)
    close(prepared.advantage, on_tokens([0.866024, -0.866024, 0.866024, -0.866024], P))
    assert (batch.mask & ~prepared.keep).nonzero().tolist() == [list(at) for at in dropped]
    assert prepared.totals == hapo.StepTotals(sequences=4, tokens=14, kept=14 - len(dropped))
    assert loss_and_grad(method, batch)[0] == pytest.approx(loss, abs=1e-6)


def test_stapo_thresholds_and_gradient():
    batch = stapo_batch()
    candidates = batch.mask & (batch.logp.exp() < 0.002) & (batch.reward > 0).unsqueeze(1)
    assert candidates.nonzero().tolist() == [[0, 1], [0, 3], [2, 0], [2, 2]]
    flat, mask = batch.entropy.flatten(), batch.mask.flatten()
    assert masked_quantile(flat, candidates.flatten(), 0.75).item() == pytest.approx(0.9, abs=1e-6)
    assert masked_quantile(flat, mask, 0.8).item() == pytest.approx(0.42, abs=1e-6)
    _, grad, _ = loss_and_grad(hapo.method("stapo"), batch)
    close(grad, GRAD)
    _, grad, _ = loss_and_grad(hapo.method("stapo", quantile_scope="all", q=0.8), batch)
    close(grad[2:3], [[0.0, -0.073772, -0.086602, 0.0]])


def test_stapo_silences_the_dropped_and_rescales_the_others():
    batch = stapo_batch()
    keep = one_step(hapo.method("stapo"), batch).keep
    _, grad, _ = loss_and_grad(hapo.method("stapo"), batch)
    _, unmasked, _ = loss_and_grad(hapo.method("dapo", filter_groups=False), batch)
    torch.testing.assert_close(grad, torch.where(keep, unmasked * 14 / 11, 0.0))


def test_stapo_drops_more_as_q_rises_and_never_the_most_uncertain_candidate():
    kept = [one_step(hapo.method("stapo", q=q), stapo_batch()).keep for q in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert all((later <= earlier).all() for earlier, later in pairwise(kept))
    assert kept[0].sum() == 14
    assert kept[-1].sum() == 11
    assert kept[-1][0, 3]


@pytest.mark.parametrize(
    ("logp", "entropy", "advantage", "keep"),
    [
        pytest.param([-9.0, -1.0], [0.0, 1.0], [1.0, 1.0], [True, True], id="one candidate"),
        pytest.param([-9.0, -9.0], [0.5, 0.5], [1.0, 1.0], [True, True], id="tied candidates"),
        pytest.param([-9.0, -9.0], [0.0, 0.5], [-1.0, -1.0], [True, True], id="A < 0"),
        pytest.param([-9.0, -9.0], [0.0, 0.5], [0.0, 0.0], [True, True], id="A = 0"),
        pytest.param([-9.0, -9.0], [0.0, 0.5], [1.0, 1.0], [False, True], id="two candidates"),
    ],
)
def test_stapo_comparisons_are_strict_and_padding_is_no_candidate(logp, entropy, advantage, keep):
    """A third, masked column is rare, certain and of positive advantage: it would move the quantile."""
    out = not_spurious(
        T([[*logp, -9.0]]),
        T([[*entropy, 0.0]]),
        T([[*advantage, 1.0]]),
        T([[True, True, False]]),
        tau_p=0.002,
        q=0.75,
    )
    assert out.tolist() == [[*keep, False]]
