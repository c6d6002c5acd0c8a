"""The same logits, statistics and T_base give the same temperature in core, transformers and both runners."""

import subprocess
import sys

import pytest
import torch
import vllm
from vllm import SamplingParams

import hapo
from hapo.parts.entropy import entropy_from_logits
from hapo.samplers import vllm as sampler
from hapo.samplers.rule import TemperatureRule, rule_options
from hapo.samplers.transformers import TemperedLogits

from .reference import STATS
from .runners import V1_ONLY, RunnerV1, RunnerV2

ROWS, VOCABULARY = 32, 1000

RULES = [
    {"tau": 0.5},
    {"tau": 0.5, "variant": "release"},
    {"rule": "zscore", "tau": 0.4},
    {"rule": "dynatemp", "tau": 0.5, "vocabulary": VOCABULARY},
    {"rule": "edt", "theta": 0.2},
]


def logits(dtype: torch.dtype) -> torch.Tensor:
    """From nearly certain to nearly uniform rows, one in four with masked vocabulary, all of them offset."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, VOCABULARY, generator=generator) * torch.linspace(0.1, 12, ROWS).unsqueeze(1) + 3
    x[::4, 5:900] = -torch.inf
    return x.to(dtype)


def divided_by(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Temperature of each row, from its largest logit; -inf stays -inf."""
    assert torch.equal(after.isneginf(), before.isneginf())
    at = before.abs().masked_fill(before.isneginf(), 0).argmax(-1, keepdim=True)
    return (before.double().gather(-1, at) / after.double().gather(-1, at)).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t_base", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("options", RULES, ids=lambda o: "-".join(map(str, o.values())))
def test_one_rule(options, t_base, dtype):
    """To 1e-5, for every rule."""
    x = logits(dtype)
    described = rule_options(options)
    rule = TemperatureRule(described, STATS if described.needs_stats else None)
    params = SamplingParams(temperature=t_base, extra_args=rule.to_args())

    core = t_base * rule.factor(entropy_from_logits(x, t_base)).double()
    if described.needs_stats:  # a method's own
        of_method = hapo.method("grpo", temperature=options).temperature(x, STATS, t_base).double()
        torch.testing.assert_close(of_method, core, rtol=1e-6, atol=0)
    assert core.max() - core.min() > 0.05 * t_base

    warped = TemperedLogits(rule.factor, t_base)(torch.empty(0), x.float()) / t_base
    v1 = RunnerV1(ROWS, VOCABULARY)
    v1.step([], {f"r{row}": params for row in range(ROWS)})
    found = [warped, v1.sample_from(x.clone())]
    if not V1_ONLY:
        v2 = RunnerV2(ROWS, VOCABULARY)
        for slot in range(ROWS):
            v2.add(slot, params)
        found.append(v2.sample_from(x.clone(), list(range(ROWS))))
    for after in found:
        torch.testing.assert_close(divided_by(after, x), core, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("version", "chosen", "said"),
    [("0.28.0", None, 1), ("0.30.1", "0", 0), ("0.31.0", None, 0), ("0.32.0", None, 0)],
)
def test_an_engine_that_hapo_keeps_to_runner_v1_says_so_once(monkeypatch, caplog, version, chosen, said):
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(sampler, "_said", False)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    if chosen is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", chosen)
    for _ in range(2):
        sampler.AdaptiveTemperature(object(), torch.device("cpu"))
    lines = [record.getMessage() for record in caplog.records if record.name == sampler.__name__]
    assert len(lines) == said
    assert all("keeps to Model Runner V1" in line and "docs/engines.md" in line for line in lines)


def test_an_older_vllm_starts_with_hapo_beside_it():
    """Without the interface of Runner V2 the entry point still loads; requests with a rule are refused."""
    script = """
import sys
sys.modules["vllm.v1.worker.gpu.sample.logits_processor"] = None
import vllm
vllm.__version__ = "0.23.0"
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import _load_custom_logitsprocs
(processor,) = [c for c in _load_custom_logitsprocs(None) if c.__module__ == "hapo.samplers.vllm"]
processor.validate_params(SamplingParams())
try:
    processor.validate_params(SamplingParams(extra_args={"hapo_rule": "edt"}))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "this is 0.23.0" in done.stdout
