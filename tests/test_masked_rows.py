"""A reward counts in its group whatever the row's mask says, unless the response could not be scored (NaN)."""

from __future__ import annotations

import pytest
import torch

import hapo
from tests.examples import one_step

TOKEN_LEVEL = {"hapo"}
"""A row weighs as many tokens as it has."""
SHAPED = {"gtpo", "grpo_s"}
"""Right and wrong responses are compared apart, by their entropies: a row without tokens has none."""


def group_of_four(reward: list[float], masked: list[int]) -> hapo.TokenBatch:
    """Four responses of three tokens to one prompt; some of them masked."""
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(4, 3, generator=g)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[masked] = False
    return hapo.TokenBatch(
        mask=mask,
        old_logp=old,
        logp=(old + 0.1 * torch.randn(4, 3, generator=g)).requires_grad_(),
        ref_logp=old - 0.1,
        old_entropy=-old,
        entropy=-old,
        reward=torch.tensor(reward, dtype=torch.float32),
        group=torch.zeros(4, dtype=torch.long),
    )


@pytest.mark.parametrize("name", sorted({*hapo.methods("policy")} - TOKEN_LEVEL - SHAPED))
def test_two_right_answers_and_two_that_were_cut_off(name):
    """TRL and verl give the right ones (1 - 1/2) / sqrt(1/3) = 0.866; Dr. GRPO, RLOO and those of diffusion do not divide."""
    method = hapo.method(name)
    batch = group_of_four([1, 1, 0, 0], masked=[2, 3])
    prepared = one_step(method, batch)
    expected = {"dr_grpo": 0.5, "diffu_grpo": 0.5, "rloo": 2 / 3, "espo": 2 / 3}.get(name, 0.8660254)
    if name == "edge_grpo":
        mean = batch.old_entropy.mean(1)
        expected = expected * mean[:2].mean().item() / mean[:2]
    else:
        expected = torch.full((2,), expected)
    torch.testing.assert_close(prepared.advantage[:2, 0], expected, atol=2e-6, rtol=0)
    assert (prepared.advantage[2:] == 0).all()
    assert prepared.totals.sequences == 2
    assert prepared.totals.tokens == 6
    (grad,) = torch.autograd.grad(method.loss(prepared).loss, batch.logp)
    assert (grad[:2] != 0).any()
    assert (grad[2:] == 0).all()


@pytest.mark.parametrize("name", sorted(TOKEN_LEVEL | SHAPED))
def test_methods_that_compare_tokens_or_entropies_read_no_row_without_any(name):
    method, whole = hapo.method(name), group_of_four([1, 0, 0, 0], masked=[])
    found = method.prepare(group_of_four([1, 0, 0, 0], masked=[2, 3])).advantage
    torch.testing.assert_close(found[:2], method.prepare(whole.rows([0, 1])).advantage)
    assert (found[:2] != 0).all()


@pytest.mark.parametrize("unscored", ["reward", "verdict"])
@pytest.mark.parametrize("name", [*hapo.methods("policy")])
def test_one_answer_that_could_not_be_scored(name, unscored):
    """The group's other answers learn from one another."""
    method = hapo.method(name)
    batch = group_of_four([1, 1, 0, 0], masked=[])
    batch = batch.replace(**{"verdict": batch.reward, unscored: torch.tensor([1, 1, 0, torch.nan])})
    prepared = one_step(method, batch)
    assert prepared.totals.sequences == 3
    assert (prepared.advantage[3] == 0).all()
    loss = method.loss(prepared).loss
    (grad,) = torch.autograd.grad(loss, batch.logp)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert (grad[:3] != 0).any()
    assert (grad[3] == 0).all()


def test_an_answer_that_could_not_be_scored_is_no_reason_to_keep_its_group():
    batch = group_of_four([1, 1, 1, torch.nan], masked=[])
    assert not hapo.method("dapo").prepare(batch).mask.any()


def test_nothing_that_could_be_scored_is_an_empty_batch():
    method, batch = hapo.method("grpo"), group_of_four([torch.nan] * 4, masked=[])
    loss = method.loss(method.prepare(batch)).loss
    (grad,) = torch.autograd.grad(loss, batch.logp)
    assert loss == 0
    assert (grad == 0).all()


def test_right_wrong_cut_off_and_not_scored():
    """Three rewards count: mean 1/3, deviation sqrt(1/3)."""
    batch = group_of_four([1, 0, 0, torch.nan], masked=[2])
    advantage = hapo.method("grpo").prepare(batch).advantage[:, 0]
    assert advantage.tolist() == pytest.approx([1.154698, -0.577349, 0.0, 0.0], abs=1e-6)
