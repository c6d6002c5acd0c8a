"""What a method refuses, and what the message says."""

import json
import subprocess
import sys

import pytest
import torch

import hapo
from hapo.parts.reduce import token_mean
from tests.examples import OLD, one_step, padded, worked_batch

OPTIONS = [
    ("gspo", {"eps_low": "3e-4"}, "eps_low must be a number, got '3e-4' (YAML takes 3e-4 for a word"),
    ("cispo", {"trust_region": (0.2, float("nan"))}, "trust_region is NaN"),
    ("hapo", {"components": "BCD", "temperature": {}}, "temperature must be None where component A is off"),
    ("stapo", {"variant": "release"}, "method 'stapo' has no option 'variant'"),
    ("hapo", {"temperature": {"tau": 1.0}}, "tau must be in [0, 1)"),
    ("hapo", {"temperature": {"tau": float("nan")}}, "tau is NaN"),
    ("hapo", {"temperature": {"t_min": 0.0}}, "t_min must be"),
    ("hapo", {"temperature": {"rho": 0.5}}, "temperature rho must be rho = 0.8"),
    (
        "hapo",
        {"components": "BCD", "temperature": {"tau": 0.1}},
        "temperature must be None where component A is off",
    ),
    ("dapo", {"temperature": {"tua": 0.1}}, "temperature has no option 'tua'; did you mean 'tau'"),
    ("dapo", {"temperature": 0.1}, "temperature must be a mapping"),
    (
        "dapo",
        {"temperature": {"rule": "z-score"}},
        "rule must be one of 'bounded', 'zscore', got 'z-score'",
    ),
    ("hapo", {"components": "ABE"}, "components must be made of the letters"),
    ("hapo", {"alpha": 4.0}, "alpha must be below 4"),
    ("hapo", {"beta": 1.5}, "beta must be"),
    ("hapo", {"eps_hihg": 0.3}, "did you mean 'eps_high'"),
    ("hapo", {"tau": 0.1}, "tau belongs to the temperature: temperature={'tau': 0.1}"),
    ("grpo", {"reduction": "token_mean"}, "method 'grpo' has no option 'reduction'"),
    ("grpo", {"eps_low": 1.2}, "eps_low must be in (0, 1), got 1.2"),
    ("grpo", {"dual_clip": 0.5}, "dual_clip must be > 1"),
    ("grpo", {"kl_coef": -0.1}, "kl_coef must be >= 0"),
    ("grpo", {"singleton": "one"}, "singleton must be one of"),
    ("dr_grpo", {"length_limit": 0}, "length_limit must be >= 1"),
    ("gspo", {"form": "tokens"}, "form must be one of 'sequence', 'token'"),
    ("cispo", {"is_weight_cap": 0.28}, "is_weight_cap must be >= 1: it is the cap itself"),
    ("cispo", {"trust_region": 0.2}, "trust_region must be a pair"),
    ("rloo", {"clip": (1.2, 0.2)}, "clip must be 0 < eps_low < 1"),
    ("stapo", {"q": 1.5}, "q must be in [0, 1]"),
    ("stapo", {"quantile_scope": "batch"}, "quantile_scope must be one of 'candidates', 'all'"),
    ("forking_tokens", {"rho": 0.0}, "rho must be in (0, 1]"),
    ("archer", {"eps_reasoning": 1.0}, "eps_reasoning must be in"),
    ("archer", {"variant": "v2"}, "variant must be one of 'paper', 'release'"),
    ("aspo", {"c_pos": 0.5}, "c_pos must be >= 1"),
    ("aspo", {"eps_high": 0.28, "eps_uncertain": 0.4}, "eps_high must be eps_low where eps_uncertain is set"),
    ("ce_gppo", {"beta1": -0.5}, "beta1 must be >= 0"),
    ("diffu_grpo", {"variant": "token"}, "variant must be one of 'paper', 'release'"),
    ("espo", {"baseline": "median"}, "baseline must be one of 'leave_one_out', 'mean'"),
    ("espo", {"kl_estimator": "k4"}, "kl_estimator must be one of 'k1', 'k2', 'k3'"),
    ("entropy_adv", {"kappa": 1.0}, "kappa must be > 1"),
    ("entropy_adv", {"entropy_source": "new"}, "entropy_source must be one of 'current', 'old'"),
    ("edge_grpo", {"clamp": (2.0, 10.0)}, "clamp must be 0 < low <= 1 <= high"),
    ("gtpo", {"variant": "joint"}, "variant must be one of 'padded', 'own'"),
    ("ranktuner", {"estimator": "sorted"}, "estimator must be one of 'approx', 'exact', got 'sorted'"),
    ("ranktuner", {"base_weight": "1"}, "base_weight must be 'p' or the number 1, got '1'"),
    ("ranktuner", {"base_weight": True}, "base_weight must be 'p' or the number 1, got True"),
    ("sft", {"tau": 0.1}, "method 'sft' has no option 'tau'"),
    ("grpo_s", {"variant": "paper"}, "variant must be one of 'padded', 'joint', 'own'"),
]


SCRIPT = """
import json, sys, hapo
messages = []
for name, options, _ in json.load(sys.stdin):
    try:
        messages.append(f"no error: {hapo.method(name, **options)}")
    except ValueError as error:
        messages.append(str(error))
print(json.dumps(messages))
"""


@pytest.fixture(scope="module")
def messages():
    """From a user's process, where jaxtyping is not installed as a hook and does not refuse them first."""
    command = [sys.executable, "-c", SCRIPT]
    out = subprocess.run(command, input=json.dumps(OPTIONS), capture_output=True, text=True, check=True)
    return json.loads(out.stdout)


@pytest.mark.parametrize("i", range(len(OPTIONS)), ids=[f"{name}-{'-'.join(o)}" for name, o, _ in OPTIONS])
def test_options_that_cannot_work_are_refused(messages, i):
    assert OPTIONS[i][2] in messages[i]


def test_unknown_method_gets_the_nearest_name():
    with pytest.raises(ValueError, match="there is no method 'hap0'; did you mean 'hapo'"):
        hapo.method("hap0")


def test_the_contract_is_checked_at_the_door():
    batch = hapo.TokenBatch(
        mask=torch.ones(2, 3, dtype=torch.bool),
        old_logp=torch.zeros(2, 3),
        reward=torch.zeros(2),
        group=torch.zeros(2, dtype=torch.long),
    )
    current = batch.replace(logp=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="call method.prepare"):
        hapo.method("dapo").loss(batch)
    with pytest.raises(ValueError, match="call method.prepare"):
        hapo.method("dapo").step(batch)
    with pytest.raises(ValueError, match="reads TokenBatch.old_entropy, and it is missing"):
        hapo.method("hapo").prepare(batch)
    with pytest.raises(ValueError, match="needs TokenBatch.logp"):
        hapo.method("dapo").loss(hapo.method("dapo").prepare(batch))
    with pytest.raises(ValueError, match="reads TokenBatch.ref_logp, and it is missing"):
        hapo.method("grpo").loss(hapo.method("grpo").prepare(current))
    with pytest.raises(ValueError, match="reads TokenBatch.entropy, and it is missing"):
        one_step(hapo.method("forking_tokens"), current)
    with pytest.raises(ValueError, match="reads TokenBatch.entropy"):
        hapo.method("entropy_adv").loss(hapo.method("entropy_adv").prepare(current))


def test_a_choice_by_the_current_policy_needs_a_step():
    """prepare() leaves it to step(), and loss() says so."""
    method = hapo.method("forking_tokens")
    batch = hapo.TokenBatch(
        mask=torch.ones(2, 3, dtype=torch.bool),
        old_logp=torch.zeros(2, 3),
        reward=torch.tensor([0.0, 1.0]),
        group=torch.zeros(2, dtype=torch.long),
    )
    prepared = method.prepare(batch).replace(logp=torch.zeros(2, 3), entropy=torch.rand(2, 3))
    with pytest.raises(ValueError, match="call method.step"):
        method.loss(prepared)
    assert method.step(prepared).totals == hapo.StepTotals(sequences=2, tokens=6, kept=2)


def test_a_batch_is_prepared_anew():
    """Nothing of an earlier preparation, by another method, stays."""
    batch = worked_batch(sampler_logp=padded(OLD) + 0.1)
    first = hapo.method("hapo").prepare(batch)
    again = hapo.method("dapo", sampler_cap=None).prepare(first)
    assert (again.signal, again.weight, again.stats, again.keep) == (None, None, None, None)


def test_a_replaced_stage_is_in_the_options():
    method = hapo.method("grpo").replace(penalty=None, name="mine").replace(reduce=token_mean)
    assert method.options["replaced"] == ["name", "penalty", "reduce"]
    assert "reduce" in repr(method)
