"""VESPO: worked example, the sampler inside the weight, the kernel's shape, guards."""

import math

import pytest
import torch

import hapo
from hapo.methods.vespo import gamma_kernel
from tests.examples import close, example, loss_and_grad, on_policy


def drawn_here(batch: hapo.TokenBatch) -> hapo.TokenBatch:
    return on_policy(batch).replace(sampler_logp=None)


GRADIENT_LIMITS = [(("vespo", {}), ("dapo", {"filter_groups": False}), drawn_here)]
VARIANTS = [
    ("vespo", {"k_pos": 1.0, "lambda_neg": 0.0, "kl_coef": 0.01, "unbiased_kl": True, "filter_groups": True}),
    ("vespo", {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": (1.0, 0.5)}),
]
ROWS = {"old": [[-1.0, -2.0], [-1.0, -1.0]], "new": [[-0.9, -1.8], [-1.3, -1.1]], "reward": [1.0, 0.0]}


def test_vespo():
    """log w is 0.3 and -0.4; phi = e^(3 + 0.6 - 3 e^0.3) = 0.637898 and e^(2 - 1.2 - 2 e^-0.4) = 0.582375."""
    batch, method = example(**ROWS), hapo.method("vespo")
    loss, grad, out = loss_and_grad(method, batch)
    close(grad, [[-0.112765] * 2, [0.102950] * 2])  # -phi A / N, A = 0.707106
    assert loss == pytest.approx(0.057385, abs=1e-6)  # 0.112765 x 2.7 - 0.102950 x 2.4
    assert not out.tokens["clipped"].any()


def test_the_weight_is_against_what_drew_the_tokens():
    """With the sampler's log-probs known, the old policy's play no part, and no other correction is made."""
    batch = example(**ROWS)
    drawn = batch.replace(sampler_logp=batch.old_logp, old_logp=batch.old_logp - 0.7)
    assert hapo.method("vespo").prepare(drawn).weight is None
    loss, grad, _ = loss_and_grad(hapo.method("vespo"), drawn)
    close(grad, [[-0.112765] * 2, [0.102950] * 2])
    assert loss == pytest.approx(0.057385, abs=1e-6)


def test_the_kernel_is_one_on_policy_peaks_at_k_over_lambda_and_vanishes():
    w = torch.linspace(0.01, 6, 600).unsqueeze(1)
    mask = torch.ones_like(w, dtype=torch.bool)

    def phi(advantage: float) -> torch.Tensor:
        logp = w.log().requires_grad_()
        surrogate = gamma_kernel(
            logp, torch.zeros_like(w), torch.full_like(w, advantage), mask, 2.0, 3.0, 3.0, 2.0
        )
        return torch.autograd.grad(surrogate.loss.sum(), logp)[0] / -advantage

    for advantage, peak in ((1.0, 2 / 3), (-1.0, 3 / 2)):
        assert w[phi(advantage).argmax()].item() == pytest.approx(peak, abs=0.01)
        assert phi(advantage)[99].item() == pytest.approx(1.0, abs=1e-5)  # w = 1
        assert phi(advantage)[0] < 0.01 and phi(advantage)[-1] < 0.03


@pytest.mark.parametrize("far", [-1e4, 1e4])
def test_a_response_far_away_has_a_finite_gradient_of_nearly_nothing(far):
    batch = example(**ROWS)
    batch = batch.replace(old_logp=batch.old_logp - far)
    loss, grad, _ = loss_and_grad(hapo.method("vespo"), batch)
    assert math.isfinite(loss) and grad.abs().max() < 1e-12


def test_vespo_refuses_a_second_correction_and_a_negative_exponent():
    with pytest.raises(ValueError, match=r"sampler_cap must be None: w corrects for the sampler, got 2\.0"):
        hapo.method("vespo", sampler_cap=2.0)
    with pytest.raises(ValueError, match=r"k_neg must be >= 0 and finite, got -1"):
        hapo.method("vespo", k_neg=-1.0)
