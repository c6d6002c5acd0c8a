"""A rule as parameters and as a file: what comes back is what went, and nothing else is taken."""

from __future__ import annotations

import json
import math

import pytest
import torch

from hapo.batch import EntropyStats
from hapo.methods import TemperatureOptions
from hapo.samplers.decoding_rules import EDT, DynamicTemperature
from hapo.samplers.rule import TemperatureRule, temper_

STATS = EntropyStats(pivot=-1.25, sigma=2.5, h_max=1.5, h_min=-6.0)
STATISTICS = {"hapo_pivot": -1.25, "hapo_sigma": 2.5, "hapo_h_max": 1.5, "hapo_h_min": -6.0}
RULES = [
    TemperatureRule(TemperatureOptions(), STATS),
    TemperatureRule(TemperatureOptions(tau=0.3, rho=0.6, variant="release"), STATS),
    TemperatureRule(TemperatureOptions(rule="zscore", tau=1.7, t_min=0.5, t_max=1.5), STATS),
    TemperatureRule(DynamicTemperature(vocabulary=50_000, exponent=2.0)),
    TemperatureRule(EDT(theta=0.3)),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.options.rule)
def test_parameters_and_file_give_the_same_rule_back(rule, tmp_path):
    args = rule.to_args()
    assert all(type(v) in (str, float, int) for v in args.values())  # an OpenAI server takes scalars only
    assert TemperatureRule.from_args(json.loads(json.dumps(args))) == rule
    assert TemperatureRule.from_args({**args, "thinking_budget": 64}) == rule
    rule.save(tmp_path / "rule.json")
    assert TemperatureRule.load(tmp_path / "rule.json") == rule
    assert json.loads((tmp_path / "rule.json").read_text()) == args


def test_the_counts_of_the_statistics_are_not_parameters():
    counted = EntropyStats(**{**STATS.to_dict(), "tokens": 1000, "floored": 0.25})
    assert TemperatureRule(TemperatureOptions(), counted).to_args() == RULES[0].to_args()
    assert {k: v for k, v in RULES[0].to_args().items() if k in STATISTICS} == STATISTICS


@pytest.mark.parametrize("args", [None, {}, {"top_k": 5, "tau": 0.1}])
def test_parameters_of_others_are_no_rule(args):
    assert TemperatureRule.from_args(args) is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"hapo_tua": 0.1}, "no option 'tua'; did you mean 'tau'"),
        ({"hapo_tau": 0.1}, "'bounded' reads statistics"),
        ({"hapo_rule": "zscore"}, "'zscore' reads statistics"),
        ({"hapo_pivot": 0.1, "hapo_sigma": 1.0, "hapo_h_min": -1.0}, "hapo_h_max is missing"),
        ({**STATISTICS, "hapo_tau": 1.0}, "tau must be in"),
        ({**STATISTICS, "hapo_tau": -0.1}, "tau must be in"),
        ({**STATISTICS, "hapo_tau": math.nan}, "tau is NaN"),
        ({**STATISTICS, "hapo_rule": "zscore", "hapo_tau": math.inf}, "tau must be"),
        ({**STATISTICS, "hapo_rule": "zscore", "hapo_t_min": 0.0}, "t_min must be in"),
        ({**STATISTICS, "hapo_rule": "zscore", "hapo_t_max": 0.9}, "t_max must be >= 1"),
        ({**STATISTICS, "hapo_pivot": math.nan}, "hapo_pivot is NaN"),
        ({**STATISTICS, "hapo_pivot": math.inf}, "hapo_pivot must be finite"),
        ({**STATISTICS, "hapo_sigma": "2.5"}, "hapo_sigma must be a number"),
        ({**STATISTICS, "hapo_sigma": -1.0}, "hapo_sigma must be >= 0"),
        ({**STATISTICS, "hapo_h_max": -0.1}, "hapo_h_max must be >= 0"),
        ({**STATISTICS, "hapo_h_max": True}, "hapo_h_max must be a number"),
        ({**STATISTICS, "hapo_h_min": 0.1}, "hapo_h_min must be <= 0"),
        ({**STATISTICS, "hapo_h_min": [-1.0]}, "hapo_h_min must be a number"),
        ({"hapo_rule": "dynatemp"}, "vocabulary must be a whole number > 1"),
        ({"hapo_rule": "dynatemp", "hapo_vocabulary": 1}, "vocabulary must be a whole number > 1"),
        ({"hapo_rule": "dynatemp", "hapo_vocabulary": 9, "hapo_exponent": 0.0}, "exponent must be > 0"),
        ({"hapo_rule": "edt", "hapo_theta": -0.1}, "theta must be >= 0"),
        ({"hapo_rule": "edt", "hapo_tau": 0.1}, "the rule 'edt' has no option 'tau'"),
        ({"hapo_rule": "linear"}, "rule must be one of 'bounded', 'zscore', 'dynatemp', 'edt'"),
    ],
)
def test_bad_parameters_are_refused_with_their_name(args, message):
    with pytest.raises(ValueError, match=message):
        TemperatureRule.from_args(args)


@pytest.mark.parametrize(
    ("text", "message"),
    [("hapo_tau: 0.1", "is no JSON"), ("[1, 2]", "holds no parameter"), ('{"tau": 0.1}', "holds no parameter")],
)
def test_a_file_of_another_kind_is_refused(tmp_path, text, message):
    (tmp_path / "rule.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        TemperatureRule.load(tmp_path / "rule.json")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.options.rule)
@pytest.mark.parametrize("rows", [None, [4, 1]])
def test_only_the_chosen_rows_are_divided_each_at_its_own_base_temperature(rule, rows):
    generator = torch.Generator().manual_seed(2)
    logits = 6 * torch.randn(6, 300, generator=generator)
    t_base = torch.tensor([0.7, 1.0, 1.3, 0.5, 0.9, 2.0])
    tempered = logits.clone()
    temper_(tempered, rule, t_base, None if rows is None else torch.tensor(rows))
    chosen = list(range(6)) if rows is None else rows
    for row in range(6):
        if row in chosen:
            entropy = torch.distributions.Categorical(logits=logits[row].double() / t_base[row]).entropy()
            by_hand = logits[row].double() / rule.factor(entropy).double()
            torch.testing.assert_close(tempered[row].double(), by_hand, atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(tempered[row], logits[row])
