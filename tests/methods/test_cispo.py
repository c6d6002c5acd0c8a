"""CISPO: worked example, bounded weights, trust region."""

import pytest
import torch

import hapo
from tests.examples import OLD, close, loss_and_grad, on_tokens, worked_batch


def test_cispo():
    batch = worked_batch()
    method = hapo.method("cispo", is_weight_cap=1.28, filter_groups=False)
    close(method.prepare(batch).advantage, on_tokens([0.866024, -0.866024, -0.866024, 0.866024, 0.0, 0.0], OLD))
    loss, grad, out = loss_and_grad(method, batch)
    assert loss == pytest.approx(-0.018924, abs=1e-6)
    close(
        out.tokens["ratio"].clamp(1 - out.tokens["low"], 1 + out.tokens["high"]),
        [
            [1.221403, 0.860708, 1.051271, 1.280000],
            [0.740818, 1.105171],
            [1.020201, 0.778801, 1.280000],
            [1.000000, 0.818731],
            [1.105171, 0.951229, 1.000000],
            [1.280000, 0.670320],
        ],
        batch.mask,
    )
    close(
        grad,
        [
            [-0.066110, -0.046587, -0.056902, -0.069282],
            [0.040098, 0.059819],
            [0.055220, 0.042154, 0.069282],
            [-0.054126, -0.044315],
            [0.0],
            [0.0],
        ],
    )


def test_cispo_weight_between_floor_and_cap():
    batch = worked_batch()
    for options in ({"is_weight_cap": 1.1, "is_weight_floor": 0.9}, {"is_weight_cap": float("inf")}):
        method = hapo.method("cispo", filter_groups=False, **options)
        _, grad, out = loss_and_grad(method, batch)
        weight = out.tokens["ratio"].clamp(options.get("is_weight_floor", 0), options["is_weight_cap"])
        expected = -weight * out.tokens["advantage"] / 16
        torch.testing.assert_close(grad, torch.where(batch.mask, expected, 0.0))


def test_cispo_trust_region_leaves_gradients_where_ppo_would_not_clip():
    batch = worked_batch()
    _, free, _ = loss_and_grad(hapo.method("cispo", is_weight_cap=9.0), batch)
    _, held, _ = loss_and_grad(hapo.method("cispo", is_weight_cap=9.0, trust_region=(0.2, 0.28)), batch)
    _, dapo, out = loss_and_grad(hapo.method("dapo"), batch)
    torch.testing.assert_close(held, dapo)
    outside = held != free
    assert torch.equal(outside, out.tokens["clipped"])
    assert outside.sum() == 3
