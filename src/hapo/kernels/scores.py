"""Scoring on a GPU: one read of the logits gives log-prob and entropy, one read and one write their gradient.

`hapo.scoring` chooses it for logits on CUDA where HAPO_TRITON=1. Shapes: n positions, V vocabulary. All arithmetic
is in float32, with exponents of 2, as in `hapo.parts.entropy`. First uses are compared with `hapo.kernels.plain`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from . import checked, plain

LN2 = tl.constexpr(math.log(2.0))
FLOOR = tl.constexpr(-1100.0)
"""A floor for exponents of 2: 2**-1100 is 0, and 0 * FLOOR is 0 where 0 * -inf would be NaN."""

BLOCK, WARPS = 4096, 8


def scores(
    logits: Float[Tensor, "n V"],
    tokens: Int[Tensor, " n"],
    scale: Float[Tensor, " n"] | None = None,
    block: int = BLOCK,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """log p at the tokens, entropy and logsumexp, nats, of softmax(scale * logits); `scale` is positive."""
    n, vocabulary = logits.shape
    out = logits.new_empty((3, n), dtype=torch.float32)

    def launch() -> None:
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            _scores[(n,)](
                logits,
                logits.stride(0),
                tokens,
                tokens if scale is None else scale,
                out,
                n,
                vocabulary,
                scale is not None,
                block,
                num_warps=WARPS,
            )

    checked(
        "scores",
        launch,
        lambda few: (out[0, few], out[1, few], out[2, few]),
        lambda few: plain.scores(logits[few], tokens[few], None if scale is None else scale[few]),
        n,
        logits,
        scale is not None,
        block,
    )
    return out[0], out[1], out[2]


def gradient(
    logits: Float[Tensor, "n V"],
    tokens: Int[Tensor, " n"],
    normaliser: Float[Tensor, " n"],
    entropy: Float[Tensor, " n"],
    to_logp: Float[Tensor, " n"],
    to_entropy: Float[Tensor, " n"] | None,
    out: Float[Tensor, "n V"],
    block: int = BLOCK,
) -> None:
    """out <- to_logp (onehot - p) - to_entropy p (log p + H), log p = logits - normaliser; `out` may be
    `logits`."""
    n, vocabulary = logits.shape

    def launch() -> None:
        with torch.cuda.device_of(logits):
            _gradient[(n, triton.cdiv(vocabulary, block))](
                logits,
                logits.stride(0),
                tokens,
                normaliser,
                entropy,
                to_logp,
                to_logp if to_entropy is None else to_entropy,
                out,
                out.stride(0),
                vocabulary,
                to_entropy is not None,
                block,
                num_warps=WARPS,
            )

    def expected(few: slice) -> tuple[Tensor]:
        b = None if to_entropy is None else to_entropy[few]
        return (plain.gradient(logits[few], tokens[few], normaliser[few], entropy[few], to_logp[few], b),)

    checked(
        "gradient",
        launch,
        lambda few: (out[few],),
        expected,
        n,
        logits,
        to_entropy is not None,
        out.dtype,
        out.stride(),
        block,
    )


@triton.jit
def _scores(
    logits: tl.tensor,
    row_stride: tl.tensor,
    tokens: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    vocabulary: tl.tensor,
    has_scale: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One program a row: the maximum is of a block, the sums are of a column of blocks until the end."""
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * row_stride
    factor = 1.0
    if has_scale:
        factor = tl.load(scale + i)
    unit = factor / LN2
    m = float("-inf")
    s = tl.zeros((block,), tl.float32)
    d = tl.zeros((block,), tl.float32)
    for start in range(0, vocabulary, block):
        column = start + tl.arange(0, block)
        x = tl.load(row + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        top = tl.maximum(m, tl.max(x, 0))
        zero = tl.where(top == float("-inf"), 0.0, top)  # no finite logit yet: any finite reference will do
        z = (x - zero) * unit  # the maximum goes before the scale, so that an offset costs no digits
        z = tl.where(z < FLOOR, FLOOR, z)  # not tl.maximum, which would drop NaN
        e = tl.exp2(z)
        moved = (m - zero) * unit
        moved = tl.where(moved < FLOOR, FLOOR, moved)
        shrink = tl.exp2(moved)
        d = shrink * (d + s * moved) + e * z
        s = shrink * s + e
        m = top
    total = tl.sum(s, 0)
    log_total = tl.log2(total)
    h = (log_total - tl.sum(d, 0) / total) * LN2
    taken = tl.load(row + tl.load(tokens + i)).to(tl.float32)
    tl.store(out + i, ((taken - m) * unit - log_total) * LN2)
    tl.store(out + n + i, tl.where(h < 0.0, 0.0, h))
    tl.store(out + 2 * n + i, m * factor + log_total * LN2)


@triton.jit
def _gradient(
    logits: tl.tensor,
    row_stride: tl.tensor,
    tokens: tl.tensor,
    normaliser: tl.tensor,
    entropy: tl.tensor,
    to_logp: tl.tensor,
    to_entropy: tl.tensor,
    out: tl.tensor,
    out_stride: tl.tensor,
    vocabulary: tl.tensor,
    has_entropy: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One program a block of a row."""
    i = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < vocabulary
    z = tl.load(logits + i * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    log_p = z - tl.load(normaliser + i)
    p = tl.exp2(log_p / LN2)
    a = tl.load(to_logp + i)
    g = tl.where(column == tl.load(tokens + i), a, 0.0) - a * p
    if has_entropy:
        # 0 at -inf, where p is 0
        g -= tl.load(to_entropy + i) * p * tl.where(p > 0.0, log_p + tl.load(entropy + i), 0.0)
    tl.store(out + i * out_stride + column, g.to(out.dtype.element_ty), mask=inside)
