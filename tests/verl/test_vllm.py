"""verl's own vLLM rollout, on CPU: what it draws from, and which weights."""

from pathlib import Path

import pytest
import torch

from tests.verl.inputs import make_inputs
from tests.verl.launch import VerlRun, launch
from tests.verl.vllm_run import ON_VLLM, T_BASE, Rollout, hide_entry_points


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32, which vLLM's attention on CPUs can do."""
    return make_inputs(tmp_path_factory.mktemp("inputs"), width=64)


@pytest.fixture(scope="module")
def trained(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> VerlRun:
    """Three global steps."""
    return launch(wide, tmp_path_factory.mktemp("run"), *ON_VLLM).wait()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def test_first_rollout(trained: VerlRun) -> None:
    """Before there are statistics, tokens are drawn at T_base."""
    first = Rollout(trained, 1)
    assert apart(first.column("logp_sampler"), first.logp(first.logits())) <= 1e-4
    assert apart(first.column("temperature"), torch.tensor(T_BASE)) <= 1e-6


@pytest.mark.parametrize("step", [2, 3])
def test_tempered_rollout(trained: VerlRun, step: int) -> None:
    """Drawn by the weights and the statistics of the step before, at T_base x factor(H)."""
    batch = Rollout(trained, step)
    logits = batch.logits()
    temperature = batch.temperature(logits)
    sampler = batch.column("logp_sampler")
    assert apart(sampler, batch.logp(logits, temperature)) <= 1e-4
    assert apart(sampler, batch.logp(logits)) > 0.1
    assert apart(batch.column("temperature"), temperature) <= 1e-3
    assert apart(batch.column("logp_old"), batch.logp(logits)) <= 2e-4
    stale = batch.logits(step - 2)
    assert apart(sampler, batch.logp(stale, batch.temperature(stale))) > 0.1  # the weights went over


@pytest.mark.parametrize("step", [1, 2, 3])
def test_importance_weight(trained: VerlRun, step: int) -> None:
    """As verl computes it: truncated at its threshold."""
    batch = Rollout(trained, step)
    expected = (batch.column("logp_old") - batch.column("logp_sampler")).exp().clamp(max=2.0)
    assert apart(batch.column("weight"), expected) <= 1e-4
    assert step == 1 or apart(expected, torch.ones(())) > 0.1


def test_server_without_processor(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM that does not find hapo's entry point samples at T_base, and is refused before the first rollout."""
    (tmp_path / "path").mkdir()
    monkeypatch.setenv("PYTHONPATH", hide_entry_points(tmp_path / "path"))
    run = launch(wide, tmp_path, *ON_VLLM)
    assert run.end() not in (0, -1)
    assert "a temperature rule that cannot be without a word, so it would apply none" in run.log
    assert not list(run.out.glob("tokens/*"))
