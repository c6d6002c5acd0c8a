"""The log of vLLM's draws, without vLLM: policies over what truncation left. tests/vllm runs it in engines."""

from __future__ import annotations

import math

import pytest
import torch

from hapo.batch import EntropyStats
from hapo.methods import TemperatureOptions
from hapo.samplers.rule import TemperatureRule
from hapo.samplers.vllm_draws import DrawLog, logp_over

RULE = TemperatureRule(TemperatureOptions(tau=0.5), EntropyStats(pivot=-0.5, sigma=1.0, h_max=1.2, h_min=-4.0))
IDS = torch.tensor([[7, 2], [4, 9]])
LOGITS = torch.tensor([[3.0, 1.0], [2.0, 0.5]], dtype=torch.float64)


def test_log_probs_over_a_support_by_hand():
    """Of two members, and of one token alone, which has probability 1."""
    found = logp_over(torch.tensor([2, 4]), [[2, 7], [4]], IDS, LOGITS)
    assert found.tolist() == pytest.approx([-math.log(1 + math.exp(2)), 0.0], abs=1e-12)


def test_what_ties_with_the_last_logit_is_in_its_place():
    """Token 5 is in the support and not among the two largest: top-k kept it beside token 2."""
    found = logp_over(torch.tensor([5, 9]), [[2, 5, 7], [4, 9]], IDS, LOGITS)
    assert found.tolist() == pytest.approx([-math.log(2 + math.exp(2)), -math.log(1 + math.exp(1.5))], abs=1e-12)


def test_the_policy_over_supports_of_requests_with_unlike_top_k():
    """At T_base, whatever the rule made of the draw; entropies are of the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    logits, t_base = torch.randn(2, 50, generator=generator) * 3, torch.tensor([0.7, 1.3])
    log = DrawLog()
    first, second = log.begin([1], [], 3), log.begin([2], [], 20)
    tempered = logits.clone()
    log.temper_(tempered, [(RULE, torch.tensor([0, 1]))], t_base, [(first, 0), (second, 0)], None)
    assert not torch.allclose(tempered, logits)
    supports = [[row.topk(k).indices.sort().values.tolist()] for row, k in zip(logits, (3, 12), strict=True)]
    tokens = [[support[0][-1]] for support in supports]
    drawn = tempered / t_base.unsqueeze(1)
    logps = [[drawn[b, s].log_softmax(-1)[-1].item()] for b, (s,) in enumerate(supports)]
    draws = log.draws([[1], [2]], tokens, logps, supports)
    at_base = logits.double() / t_base.unsqueeze(1)
    expected = [at_base[b, s].log_softmax(-1)[-1].item() for b, (s,) in enumerate(supports)]
    assert draws.policy_logp.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert draws.logp.tolist() == [[pytest.approx(x[0])] for x in logps]
    p = at_base.softmax(-1)
    assert torch.allclose(draws.entropy.flatten().double(), torch.special.entr(p).sum(-1), atol=1e-5)
