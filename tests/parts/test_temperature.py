"""The temperature rules that need no statistics, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from hapo.batch import EntropyStats
from hapo.samplers.decoding_rules import EDT, DynamicTemperature
from hapo.samplers.rule import rule_options

V = 1000
TOP = math.log(V)


def dynatemp_factor(entropy, vocabulary, tau, exponent=1.0):
    return DynamicTemperature(vocabulary=vocabulary, tau=tau, exponent=exponent).factor(entropy)


def edt_factor(entropy, theta, low=0.1):
    return EDT(theta=theta, t_min=low).factor(entropy)


def test_dynatemp_goes_from_one_minus_tau_to_one_plus_tau():
    entropy = torch.tensor([0.0, TOP / 4, TOP / 2, TOP], dtype=torch.float64)
    torch.testing.assert_close(dynatemp_factor(entropy, V, 0.4), torch.tensor([0.6, 0.8, 1.0, 1.4]))
    squared = torch.tensor([0.6, 0.65, 0.8, 1.4])  # (1/4)^2 = 1/16, (1/2)^2 = 1/4
    torch.testing.assert_close(dynatemp_factor(entropy, V, 0.4, exponent=2.0), squared)
    assert torch.equal(dynatemp_factor(torch.tensor([TOP + 1e-3]), V, 0.4), torch.tensor([1.4]))  # rounding


def test_dynatemp_is_the_range_of_llama_cpp():
    """There: min + (max - min) (H / ln n)^exponent, with min = T - delta, max = T + delta; delta = tau T."""
    t, delta, exponent = 0.8, 0.3, 1.7
    entropy = torch.linspace(0, TOP, 20, dtype=torch.float64)
    theirs = (t - delta) + 2 * delta * (entropy / TOP) ** exponent
    ours = t * dynatemp_factor(entropy, V, delta / t, exponent)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=0)


def test_edt_is_a_power_of_the_inverse_entropy():
    entropy = torch.tensor([0.1, 0.2, 1.0, 8.0], dtype=torch.float64)
    by_hand = [0.8**2.0, 0.8**1.0, 0.8**0.2, 0.8**0.025]
    torch.testing.assert_close(edt_factor(entropy, 0.2), torch.tensor(by_hand))
    assert torch.equal(edt_factor(torch.zeros(1), 0.2), torch.tensor([0.1]))  # the floor, not temperature 0
    assert torch.equal(edt_factor(torch.zeros(1), 0.2, low=0.3), torch.tensor([0.3]))
    assert torch.equal(edt_factor(entropy, 0.0), torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {"rule": "bounded", "tau": 0.4},
        {"rule": "zscore", "tau": 0.4},
        {"rule": "dynatemp", "tau": 0.4, "vocabulary": V},
        {"rule": "edt", "theta": 0.4},
    ],
    ids=lambda options: options["rule"],
)
def test_every_rule_rises_with_the_entropy_and_stays_positive(options, dtype):
    entropy = torch.cat([torch.zeros(1), torch.logspace(-9, math.log10(TOP), 200)]).to(dtype)
    factor = rule_options(options).factor(entropy, EntropyStats(0.4, 0.9, 1.5, -19.0))
    assert factor.min() > 0
    assert factor.isfinite().all()
    assert (factor.diff() >= 0).all()
    assert factor[-1] - factor[0] > 0.2
