"""The adaptive temperature on a GPU, in Triton: the logits are read twice and written once.

One pass over each row keeps its running maximum m, s = sum e^(z - m) and d = sum e^(z - m) (z - m) and gives the
entropy ln s - d / s; the rule then acts on one number a row; a second pass divides the rows in place.
`hapo.samplers.rule.temper_` chooses it for logits on CUDA where HAPO_TRITON=1; its torch path agrees to rounding.
Importing this module needs triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from ..parts.entropy import entropy_from_logits
from . import checked

LN2 = tl.constexpr(math.log(2.0))
FLOOR = tl.constexpr(-1100.0)
"""A floor for exponents of 2: 2**-1100 is 0, and 0 * FLOOR is 0 where 0 * -inf would be NaN."""

BLOCK = 4096


def temper_(
    logits: Float[Tensor, "N V"],
    factor: Callable[[Float[Tensor, " n"]], Float[Tensor, " n"]],
    t_base: Float[Tensor, " N"],
    rows: Int[Tensor, " n"] | None,
    block: int = BLOCK,
) -> None:
    """Divide these rows of the logits by factor(H) in place, with H the entropy of softmax(logits / T_base).

    Logits are float32, bfloat16 or float16; all arithmetic is in float32. `rows` None: all of them.
    """
    chosen = torch.arange(len(logits), device=logits.device) if rows is None else rows
    n, vocabulary = len(chosen), logits.shape[1]
    if n == 0:
        return
    t_base = t_base.float().contiguous()
    entropy = torch.empty(n, device=logits.device)
    shape = (vocabulary, *logits.stride(), block)

    def measure() -> None:
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            _entropy[(n,)](logits, chosen, t_base, entropy, *shape)

    checked(
        "entropy",
        measure,
        lambda few: (entropy[few],),
        lambda few: (entropy_from_logits(logits[chosen[few]], t_base[chosen[few]]),),
        n,
        logits,
        block,
    )
    scale = factor(entropy).float().contiguous()

    def divide() -> None:
        with torch.cuda.device_of(logits):
            _divide[(n, triton.cdiv(vocabulary, block))](logits, chosen, scale, *shape)

    # By the factor of the kernel's own entropy: near H = 0 a rule of log H makes much of its rounding.
    checked(
        "divide",
        divide,
        lambda few: (logits[chosen[few]],),
        lambda few: (logits[chosen[few]].float() / scale[few, None],),
        n,
        logits,
        block,
    )


@triton.jit
def _entropy(
    logits: tl.tensor,
    rows: tl.tensor,
    t_base: tl.tensor,
    entropy: tl.tensor,
    vocabulary: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    block: tl.constexpr,
) -> None:
    """One program a row. Exponents are of 2, as in `hapo.parts.entropy`, and relative to the maximum so far."""
    i = tl.program_id(0)
    row = tl.load(rows + i).to(tl.int64)
    unit = 1.0 / (LN2 * tl.load(t_base + row))
    m = float("-inf")
    s = 0.0
    d = 0.0
    for start in range(0, vocabulary, block):
        column = start + tl.arange(0, block)
        x = tl.load(
            logits + row * row_stride + column * column_stride, mask=column < vocabulary, other=float("-inf")
        ).to(tl.float32)
        top = tl.maximum(m, tl.max(x, 0))
        zero = tl.where(top == float("-inf"), 0.0, top)  # no finite logit yet: any finite reference will do
        # A comparison and not tl.maximum, which would drop NaN.
        z = (x - zero) * unit
        z = tl.where(z < FLOOR, FLOOR, z)
        e = tl.exp2(z)
        moved = (m - zero) * unit
        moved = tl.where(moved < FLOOR, FLOOR, moved)
        shrink = tl.exp2(moved)
        d = shrink * (d + s * moved) + tl.sum(e * z, 0)
        s = shrink * s + tl.sum(e, 0)
        m = top
    h = tl.log(s) - LN2 * d / s
    tl.store(entropy + i, tl.where(h < 0.0, 0.0, h))


@triton.jit
def _divide(
    logits: tl.tensor,
    rows: tl.tensor,
    factor: tl.tensor,
    vocabulary: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    block: tl.constexpr,
) -> None:
    """One program a block of a row."""
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    at = logits + row * row_stride + column * column_stride
    x = tl.load(at, mask=column < vocabulary).to(tl.float32)
    tl.store(at, (x / tl.load(factor + tl.program_id(0))).to(logits.dtype.element_ty), mask=column < vocabulary)
