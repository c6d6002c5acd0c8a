"""SFT, DFT and CHORD-phi: worked examples, and what the weights leave out of the gradient."""

import math

import pytest
import torch

import hapo

LOGP = [[math.log(0.5), math.log(0.9), math.log(0.01)], [math.log(0.25), 0.0, math.nan]]


def batch(**changes) -> hapo.TokenBatch:
    logp = torch.tensor(LOGP)
    return hapo.TokenBatch(mask=~logp.isnan(), logp=logp.requires_grad_()).replace(**changes)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("sft", [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]),
        ("dft", [[0.5, 0.9, 0.01], [0.25, 1.0, 0.0]]),
        ("chord_phi", [[0.25, 0.09, 0.0099], [0.1875, 0.0, 0.0]]),
    ],
)
def test_worked_example(name, weights):
    given = batch()
    out = hapo.method(name).loss(given)
    expected = torch.tensor(weights)
    torch.testing.assert_close(out.tokens["weight"], expected, rtol=0, atol=1e-6)
    values = [-w * x for ws, xs in zip(weights, LOGP, strict=True) for w, x in zip(ws, xs, strict=True) if w]
    assert out.loss.item() == pytest.approx(sum(values) / 5, abs=1e-6)
    (grad,) = torch.autograd.grad(out.loss, given.logp)
    torch.testing.assert_close(grad, -expected / 5, rtol=0, atol=1e-6)


def test_the_expert_term_of_chord_s_worked_example():
    """One expert row: the spec of EGSPO prints its loss and gradient."""
    logp = torch.tensor([[-0.10, -1.20, -3.00]], requires_grad=True)
    out = hapo.method("chord_phi").loss(hapo.TokenBatch(mask=torch.ones(1, 3, dtype=torch.bool), logp=logp))
    assert out.loss.item() == pytest.approx(0.134369, abs=1e-6)
    (grad,) = torch.autograd.grad(out.loss, logp)
    torch.testing.assert_close(grad, torch.tensor([[-0.028702, -0.070159, -0.015769]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["dft", "chord_phi"])
def test_a_target_that_cannot_be_is_of_weight_0_and_adds_nothing(name):
    given = batch(logp=torch.tensor([[-math.inf, -1.0, -2.0], [-1.0, -1.0, 0.0]], requires_grad=True))
    out = hapo.method(name).loss(given)
    assert out.loss.isfinite() and out.tokens["weight"][0, 0] == 0
    (grad,) = torch.autograd.grad(out.loss, given.logp)
    assert grad[0, 0] == 0 and grad.isfinite().all()


def test_metrics_are_shares_of_the_step():
    out = hapo.method("dft").loss(batch(totals=hapo.StepTotals(sequences=4, tokens=10, kept=10)))
    assert out.metrics["weight"].item() == pytest.approx(2.66 / 10)
    assert out.metrics["nll"].item() == pytest.approx(-math.log(0.5 * 0.9 * 0.01 * 0.25) / 10)
    assert out.metrics["loss"] == out.loss


def test_a_method_of_one_s_own_says_what_it_reads():
    sft = hapo.method("sft")
    assert sft.reads == frozenset() and sft.stages == {"reduce": "token_mean"}
    mine = sft.replace(weight=lambda batch: batch.rank)
    assert mine.reads == {"entropy", "rank", "expected_rank"} and mine.options["replaced"] == ["weight"]
    assert hapo.method("ranktuner").reads == {"rank", "entropy"}
    assert hapo.method("ranktuner", estimator="exact").reads == {"rank", "expected_rank"}
    assert repr(hapo.method("ranktuner")) == "Supervised('ranktuner', estimator='approx', base_weight='p')"
