"""RankTuner: the worked example and the checks of its paper's equations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hapo
from hapo.parts.rank import approx_weight, exact_weight, expected_rank, target_rank
from tests.methods.smollm2_logits import POSITIONS, smollm2_logits

LOGITS = [[2.0, 1.0, 0.0, -1.0], [0.5, 0.4, 0.3, 0.2], [4.0, 0.0, 0.0, 0.0]]
TARGETS = [1, 2, 0]


def scored(logits: torch.Tensor, targets: torch.Tensor) -> hapo.TokenBatch:
    """A batch of one row of targets with all that a weight reads, from all logits."""
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp_min(-1e4)).sum(-1)
    return hapo.TokenBatch(
        mask=torch.ones(1, len(targets), dtype=torch.bool),
        logp=log_p.gather(-1, targets[:, None]).T,
        entropy=entropy.detach()[None],
        rank=target_rank(logits.detach(), targets)[None],
        expected_rank=expected_rank(logits.detach())[None],
    )


def worked(dtype=torch.float32):
    logits = torch.tensor(LOGITS, dtype=dtype, requires_grad=True)
    return logits, scored(logits, torch.tensor(TARGETS))


def near(actual: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(actual.double(), torch.tensor(expected).double(), rtol=0, atol=1e-6)


def test_worked_example_ranks_and_entropy():
    _, batch = worked()
    near(batch.rank[0], [2, 3, 1])
    near(batch.expected_rank[0], [1.507347, 2.375353, 1.104170])
    near(batch.entropy[0] / math.log(2), [1.367007, 1.991021, 0.377742])


@pytest.mark.parametrize(
    ("base", "estimator", "weights", "loss"),
    [
        ("p", "approx", [0.344732, 0.285244, 0.812809], 0.317144),
        ("p", "exact", [0.257987, 0.248041, 0.904115], 0.259240),
        (1, "approx", [1.455286, 1.206983, 0.857470], 1.294290),
        (1, "exact", [1.089092, 1.049563, 0.953793], 1.044516),
    ],
)
def test_worked_example_weights_and_loss(base, estimator, weights, loss):
    _, batch = worked()
    out = hapo.method("ranktuner", base_weight=base, estimator=estimator).loss(batch)
    near(out.tokens["weight"][0], weights)
    near(out.loss.detach(), loss)


def test_worked_example_gradient_is_w_p_minus_onehot_over_n():
    logits, batch = worked()
    out = hapo.method("ranktuner").loss(batch)
    (grad,) = torch.autograd.grad(out.loss, logits)
    printed = [
        [0.073993, -0.087690, 0.010014, 0.003684],
        [0.027445, 0.024834, -0.072611, 0.020332],
        [-0.014112, 0.004704, 0.004704, 0.004704],
    ]
    near(grad, printed)
    onehot = torch.nn.functional.one_hot(torch.tensor(TARGETS), 4)
    exact = out.tokens["weight"].T * (logits.detach().softmax(-1) - onehot) / 3
    torch.testing.assert_close(grad, exact, rtol=0, atol=1e-7)


def test_certain_tokens_by_both_estimators():
    """p = 1 and H = 0: approx 1.25^-0.730607, exact 1."""
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    near(approx_weight(zero, one, zero), [[0.849566]])
    assert exact_weight(zero, one, one) == 1


def test_uniform_rows_and_ties():
    """Every token ties with the target: R = V, E = (V + 1) / 2."""
    logits, targets = torch.full((2, 7), 3.0), torch.tensor([0, 6])
    assert target_rank(logits, targets).tolist() == [7, 7]
    torch.testing.assert_close(expected_rank(logits), torch.tensor([4.0, 4.0]))
    assert target_rank(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), torch.tensor([1])).item() == 2


def test_the_indicator_s_exponent_lies_between_its_bounds():
    """R = 5, E = 2: I = 0.844356 = (E / R)^0.184637, with K(R) and K(E) around the exponent."""
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    indicator = 1 / exact_weight(zero, 5 * one, 2 * one).item()
    assert indicator == pytest.approx(0.844356, abs=1e-6)
    exponent = math.log(indicator) / math.log(2 / 5)
    assert exponent == pytest.approx(0.184637, abs=1e-6)
    k_of_rank, k_of_expected = (x / (x + 1) / math.log2(x + 1) ** 2 for x in (5, 2))
    assert k_of_rank < exponent < k_of_expected


def test_approx_is_unbounded_with_base_1_and_survives_an_underflowing_p_with_base_p():
    rank, entropy = torch.full((1, 2), 8.0), torch.zeros(1, 2)
    logp = torch.tensor([[math.log(1e-13), -math.inf]])
    assert approx_weight(logp, rank, entropy, power=0.0)[0, 0].item() == pytest.approx(19.3, abs=0.5)
    assert approx_weight(logp, rank, entropy)[0, 1] == 0
    assert exact_weight(logp, rank, rank)[0, 1] == 0


def test_a_scale_of_1_gives_sft_and_dft():
    _, batch = worked()
    same = batch.replace(expected_rank=batch.rank)
    for base, name in ((1, "sft"), ("p", "dft")):
        ours = hapo.method("ranktuner", estimator="exact", base_weight=base).loss(same).loss
        assert torch.equal(ours, hapo.method(name).loss(batch).loss)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**31 - 1), v=st.integers(2, 400), spread=st.sampled_from([0.01, 1.0, 4.0, 30.0]))
def test_bounds_of_ranks_scales_and_weights(seed, v, spread):
    g = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(9, v, generator=g, dtype=torch.float64)
    targets = torch.randint(v, (9,), generator=g)
    batch = scored(logits, targets)
    p, rank, expected = batch.logp.exp(), batch.rank, batch.expected_rank
    bits = batch.entropy / math.log(2)
    tiny = 1e-9
    assert (rank == rank.round()).all() and (rank >= 1).all() and (rank <= (1 + tiny) / p).all()
    assert (expected >= 1 - tiny).all() and (expected <= (v + 1) / 2 + tiny).all()
    assert (expected >= 2**bits / 4 + 1 - tiny)[bits >= 2].all()

    scale = exact_weight(batch.logp, rank, expected, power=0.0)
    assert (scale > 0.5).all() and (scale < 2).all()
    assert ((scale > 1) == (rank > expected)).all()
    assert (exact_weight(batch.logp, rank, expected) < 2 * p + 1e-300).all()
    assert (exact_weight(batch.logp, rank + 1, expected, power=0.0) > scale).all()
    assert (exact_weight(batch.logp, rank, expected + 1, power=0.0) < scale).all()

    apart = ((rank - expected) / expected).abs() > 1e-3  # the quotient of logarithms is exact enough
    exponent = -scale.log() / (expected / rank).log()
    ends = torch.stack([x / (x + 1) / torch.log2(x + 1) ** 2 for x in (rank, expected)])
    between = (exponent >= ends.amin(0) - 1e-6) & (exponent <= ends.amax(0) + 1e-6)
    assert between[apart].all()

    s = 2**bits / 4 + 1
    approx = approx_weight(batch.logp, rank, batch.entropy, power=0.0)
    undecided = (p * s - 1).abs() < tiny
    assert ((approx > 1) == (p * s < 1))[~undecided].all()
    assert (approx_weight(batch.logp, rank, batch.entropy) <= 1).all()
    far = approx_weight(batch.logp, torch.full_like(rank, 1e300), batch.entropy, power=0.0)
    assert ((far - 1).abs() <= (approx - 1).abs() + tiny).all()


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**31 - 1), estimator=st.sampled_from(["approx", "exact"]))
def test_a_shift_of_the_logits_and_an_order_of_the_vocabulary_change_nothing(seed, estimator):
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(6, 50, generator=g, dtype=torch.float64)
    targets = torch.randint(50, (6,), generator=g)
    method = hapo.method("ranktuner", estimator=estimator, base_weight=1)
    weight = method.loss(scored(logits, targets)).tokens["weight"]
    shifted = scored(logits + 100 * torch.randn(6, 1, generator=g, dtype=torch.float64), targets)
    order = torch.randperm(50, generator=g)
    permuted = scored(logits[:, order], order.argsort()[targets])
    for other in (shifted, permuted):
        torch.testing.assert_close(method.loss(other).tokens["weight"], weight, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    row=st.integers(0, POSITIONS - 1),
    cooler=st.sampled_from([1.0, 1.0, 0.5, 2.0]),
    others=st.lists(st.integers(0, 49151), max_size=8),
)
def test_bounds_on_logits_of_smollm2(row, cooler, others):
    """R <= 1/p, E >= 2^H / 4 + 1 for H >= 2 bits, S in (0.5, 2), at the token of the text and at any others."""
    logits, targets = smollm2_logits()
    targets = torch.tensor([targets[row].item(), *others, 49151])
    batch = scored(cooler * logits[row].expand(len(targets), -1), targets)
    p, rank, expected, bits = batch.logp.exp(), batch.rank, batch.expected_rank, batch.entropy / math.log(2)
    assert (rank >= 1).all() and (rank * p <= 1 + 1e-9).all()
    assert (expected >= 1).all() and (expected <= 49153 / 2).all()
    assert (expected >= 2**bits / 4 + 1 - 1e-9)[bits >= 2].all()
    scale = exact_weight(batch.logp, rank, expected, power=0.0)
    assert (scale > 0.5).all() and (scale < 2).all() and ((scale > 1) == (rank > expected)).all()
    assert (approx_weight(batch.logp, rank, batch.entropy) <= 1).all()


def test_the_logits_of_smollm2_are_certain_here_and_uncertain_there():
    """So that the bounds above are asked on both sides of 2 bits."""
    log_p = smollm2_logits()[0].log_softmax(-1)
    bits = -(log_p.exp() * log_p).sum(-1) / math.log(2)
    assert (bits < 2).sum() >= 4 and (bits > 2).sum() >= 4 and bits.max() > 5
