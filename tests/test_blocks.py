"""On a CPU large batches are worked on in compact blocks of rows: the same numbers."""

from __future__ import annotations

import pytest
import torch

import hapo
import hapo.batch
from tests.test_laws import VARIANTS

CASES = [*((name, {}) for name in hapo.methods()), *VARIANTS]


def batch() -> hapo.TokenBatch:
    g = torch.Generator().manual_seed(0)
    shape = (24, 11)
    length = torch.randint(0, 12, (24, 1), generator=g)
    mask = torch.arange(11) < length
    mask[5, 3:6] = False  # tool output
    old = -2 * torch.rand(shape, generator=g)
    return hapo.TokenBatch(
        mask=mask,
        old_logp=old.masked_fill(~mask, torch.nan),
        logp=(old + 0.4 * torch.randn(shape, generator=g)).masked_fill(~mask, torch.inf),
        ref_logp=old - 0.1,
        sampler_logp=old + 0.2 * torch.randn(shape, generator=g),
        old_entropy=3 * torch.rand(shape, generator=g).square(),
        entropy=3 * torch.rand(shape, generator=g),
        reward=torch.randint(0, 2, (24,), generator=g).float(),
        group=torch.arange(24) // 6,
    )


def run(method: hapo.Method):
    logp = batch().logp.requires_grad_()
    prepared = method.step(method.prepare(batch().replace(logp=logp)))
    out = method.loss(prepared)
    out.loss.backward()
    return prepared, out, logp.grad


@pytest.mark.parametrize(("name", "options"), CASES)
def test_blocks_of_rows_add_up(name, options, monkeypatch):
    method = hapo.method(name, **options)
    prepared, out, grad = run(method)
    for module in (hapo.batch, hapo.parts.entropy):
        monkeypatch.setattr(module, "BLOCK", 40)
    assert len(hapo.batch.compact_blocks(prepared.mask)) > 3
    blocked, blocked_out, blocked_grad = run(method)
    for field in ("advantage", "signal", "weight"):
        if getattr(prepared, field) is not None:
            assert torch.equal(getattr(blocked, field), getattr(prepared, field))
    torch.testing.assert_close(blocked_out.loss, out.loss, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(blocked_grad, grad, atol=1e-7, rtol=1e-5)
    assert blocked_out.metrics.keys() == out.metrics.keys()
    for key, value in out.metrics.items():
        torch.testing.assert_close(blocked_out.metrics[key], value, atol=1e-6, rtol=1e-5)


def test_compact_blocks_hold_every_row_once_and_all_its_tokens(monkeypatch):
    monkeypatch.setattr(hapo.batch, "BLOCK", 40)
    mask = batch().mask
    blocks = hapo.batch.compact_blocks(mask)
    assert sorted(i for rows, _ in blocks for i in rows.tolist()) == list(range(24))
    for rows, width in blocks:
        assert not mask[rows, width:].any()
        assert len(rows) * width <= 40
    assert sum(len(rows) * width for rows, width in blocks) < 0.8 * mask.numel()


def test_masked_keeps_every_bit_of_what_is_valid():
    x = torch.tensor([[1.5, torch.nan, -0.0], [torch.inf, torch.nan, -2.0]])
    mask = torch.tensor([[True, False, True], [True, False, False]])
    found = hapo.batch.masked(x, mask)
    assert found.tolist() == [[1.5, 0.0, -0.0], [torch.inf, 0.0, 0.0]]
    assert hapo.batch.masked(x.double(), mask).dtype == torch.float64
    assert hapo.batch.masked(x.half(), mask).dtype == torch.float32
    column = torch.tensor([[3.0], [torch.nan]])
    assert hapo.batch.masked(column, mask & torch.tensor([[True], [False]])).tolist() == [[3, 0, 3], [0, 0, 0]]
