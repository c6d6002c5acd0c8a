"""LUSPO: worked example, gradients free of length, GSPO as its limit."""

import pytest
import torch

import hapo
from tests.examples import OLD, close, example, loss_and_grad, on_tokens, one_token, worked_batch

WIDE = {"eps_low": 0.05, "eps_high": 0.1}
GRADIENT_LIMITS = [(("luspo", WIDE), ("gspo", WIDE), one_token)]
VARIANTS = [
    ("luspo", {"eps_low": 0.2, "eps_high": 0.2, "dual_clip": 3.0, "kl_coef": 0.01}),
    ("luspo", {"scale_rewards": "batch", "off_policy_mask_threshold": 0.1}),
]


def test_luspo():
    """0.866024 / 6 times -4 x 1.1 + 2 x 0.95 + 3 x 1.058303 - 2 x 0.904837; the first two are clipped."""
    batch, method = worked_batch(), hapo.method("luspo", **WIDE)
    loss, grad, out = loss_and_grad(method, batch)
    assert loss == pytest.approx(-0.163790, abs=1e-6)
    close(grad, on_tokens([0.0, 0.0, 0.152753, -0.130602, 0.0, 0.0], OLD))
    close(out.tokens["clipped"], on_tokens([1.0, 1.0, 0.0, 0.0, 0.0, 0.0], OLD), batch.mask)


def test_a_token_learns_the_same_in_a_short_and_in_a_long_response():
    batch = example(old=[[-1.0], [-1.0] * 5, [-1.0]], new=[[-1.0], [-1.0] * 5, [-1.0]], reward=[1.0, 1.0, 0.0])
    _, grad, _ = loss_and_grad(hapo.method("luspo"), batch)
    assert torch.equal(grad[0, 0].expand(5), grad[1])
    _, of_gspo, _ = loss_and_grad(hapo.method("gspo"), batch)
    assert of_gspo[0, 0].item() == pytest.approx(5 * of_gspo[1, 0].item())
