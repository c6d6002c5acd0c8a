"""GMPO: worked example, clipping of single tokens, TRL's trainer, and GRPO as its limit."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.experimental.gmpo import GMPOTrainer

import hapo
from tests.examples import close, example, loss_and_grad, one_step, one_token, worked_batch

GRADIENT_LIMITS = [
    (
        ("gmpo", {}),
        ("grpo", {"kl_coef": 0.0, "eps_low": -math.expm1(-0.4), "eps_high": math.expm1(0.4)}),
        one_token,
    )
]
VARIANTS = [("gmpo", {"eps_low": 0.1, "eps_high": 0.2, "kl_coef": 0.01, "filter_groups": True})]


def test_gmpo_by_hand():
    """Log-ratios 0.1, 0.6 -> 0.4 of a right answer, weight e^0.25; -0.2, -0.9 -> -0.4, 0.5 of a wrong one, e^(-1/30)."""
    batch = example(
        old=[[-1.0, -2.0], [-1.0, -1.0, -3.0]], new=[[-0.9, -1.4], [-1.2, -1.9, -2.5]], reward=[1.0, 0.0]
    )
    loss, grad, out = loss_and_grad(hapo.method("gmpo"), batch)
    assert loss == pytest.approx(-0.112009, abs=1e-6)  # 0.707106 (e^(-1/30) - e^0.25) / 2
    close(grad, [[-0.226985, 0.0], [0.113987, 0.0, 0.113987]])  # A w / (S n)
    assert out.tokens["clipped"].tolist() == [[False, True, False], [False, True, False]]


@pytest.mark.parametrize("options", [{}, {"eps_low": 0.1, "eps_high": 0.2}, {"kl_coef": 0.04}])
def test_gmpo_is_trls(options):
    """Loss and gradient of TRL's own `_compute_loss`, in float64, on log-ratios inside and outside the bounds."""
    batch = worked_batch(dtype=torch.float64)
    method = hapo.method("gmpo", **options)
    prepared = one_step(method, batch)
    loss, grad, _ = loss_and_grad(method, batch)
    logp = batch.logp.detach().requires_grad_()
    theirs = trls(method, prepared, logp)
    (their_grad,) = torch.autograd.grad(theirs, logp)
    assert loss == pytest.approx(theirs.item(), abs=1e-6)
    torch.testing.assert_close(grad, their_grad, rtol=0, atol=1e-6)
    assert grad.abs().max() > 0.05


def trls(method: hapo.Method, prepared: hapo.TokenBatch, logp: torch.Tensor) -> torch.Tensor:
    """`GMPOTrainer._compute_loss` of one micro-batch, without a model: its forward pass returns these log-probs."""
    options = method.options
    clean = {name: torch.where(prepared.mask, getattr(prepared, name), 0.0) for name in ("old_logp", "ref_logp")}
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            torch.where(prepared.mask, logp, 0.0),
            torch.zeros_like(logp),
            None,
        ),
        top_entropy_quantile=1.0,
        epsilon_low=options["eps_low"],
        epsilon_high=options["eps_high"],
        beta=options["kl_coef"],
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(reduce=lambda x, reduction: x, gather=lambda x: x),
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(len(prepared), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": prepared.mask.long(),
        "completion_mask": prepared.mask.long(),
        "advantages": prepared.advantage[:, 0],
        "old_per_token_logps": clean["old_logp"],
        "ref_per_token_logps": clean["ref_logp"],
    }
    return GMPOTrainer._compute_loss(trainer, None, inputs)


def test_gmpo_refuses_a_bound_that_is_none():
    with pytest.raises(ValueError, match="eps_high must be > 0 and finite, got inf"):
        hapo.method("gmpo", eps_high=math.inf)
