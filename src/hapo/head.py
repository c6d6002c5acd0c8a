"""The output layer as one function of autograd: hidden states to log-probs, entropies and ranks, chunk by chunk.

What `hapo.scoring` is made of; the equations are in `hapo.scoring.score_hidden`.

Shapes: N positions, n of them in a chunk, D hidden size, V vocabulary, K tokens of a support.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import use_triton

Factor = Callable[[Tensor], Tensor]
"""Entropy (n,), nats -> positive temperature factor (n,)."""

IMPOSSIBLE = -1e4
"""Floor of a log-probability in the entropy, nats: exp of it is 0 in every dtype, and 0 times it is 0, not NaN."""

SORTED = {"cpu": 2**20}
SORTED_ELSEWHERE = 2**24
"""Probabilities that are sorted at a time: a sort on a GPU makes two further buffers, three times as wide."""

# CUDA multiplies half-precision operands into a float32 result since torch 2.8.
_MIXED_PRODUCTS = "dtype_out" in torch.ops.aten.addmm.overloads()


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which hidden states and weight enter the products."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if not (hidden.is_cuda and _MIXED_PRODUCTS) or dtype == torch.float64:
        return torch.promote_types(dtype, torch.float32)
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else dtype


def rounds_operands(hidden: Tensor, weight: Tensor) -> bool:
    """Whether a CPU's products round float32 operands to bfloat16, and sum in float32, as autocast asks for."""
    asked = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    there = hidden.device.type == "cpu" and hasattr(torch.backends.mkldnn, "matmul")
    return asked and there and operand_dtype(hidden, weight) == torch.float32


_ROUNDING = threading.Lock()


@contextmanager
def _rounded_operands() -> Iterator[None]:
    """Products of float32 matrices on a CPU round their operands to bfloat16, if it has AMX.

    The setting is the process's: products of another thread are rounded meanwhile. The lock is for two that score,
    of which the second would take the first one's setting for what was there before.
    """
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # put there at import
    with _ROUNDING:
        before, products.fp32_precision = products.fp32_precision, "bf16"
        try:
            yield
        finally:
            products.fp32_precision = before


@dataclass(frozen=True)
class Head:
    """From hidden states to z = logits / t_base, and how: positions a chunk, dtype of the operands."""

    scale: float
    softcap: float | None
    t_base: float
    chunk: int
    operand: torch.dtype
    rounded: bool = False
    """Float32 operands are rounded to bfloat16 inside the products."""

    @property
    def accumulator(self) -> torch.dtype:
        """Of the products, and of what they are summed into."""
        return torch.promote_types(self.operand, torch.float32)

    def chunks(self, n: int) -> Iterator[slice]:
        """The n positions, so many at a time."""
        return (slice(start, min(start + self.chunk, n)) for start in range(0, n, self.chunk))

    def addmm_(self, out: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float = 1.0) -> None:
        """out <- beta out + alpha a b, accumulated in the dtype of `out`."""
        if a.dtype != out.dtype:
            torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
            return
        with _rounded_operands() if self.rounded else nullcontext():
            out.addmm_(a, b, beta=beta, alpha=alpha)

    def buffer(self, hidden: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Room for the logits of a chunk (n, V)."""
        shape = (min(self.chunk, len(hidden)), len(weight))
        return hidden.new_empty(shape, dtype=self.accumulator if dtype is None else dtype)

    def logits_(self, out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """z of a chunk, into `out`."""
        gain = self.scale / (self.softcap or self.t_base)
        if bias is not None:
            out.copy_(bias)
        self.addmm_(out, hidden, weight.t(), beta=0.0 if bias is None else gain, alpha=gain)
        return out if self.softcap is None else out.tanh_().mul_(self.softcap / self.t_base)

    def pull_back_(self, grad: Tensor, z: Tensor) -> Tensor:
        """grad times the slope of the cap's tanh at z; overwrites both."""
        if self.softcap is None:
            return grad
        return grad.addcmul_(grad, z.mul_(self.t_base / self.softcap).square_(), value=-1.0)


def _expected_rank_(p: Tensor) -> Tensor:
    """sum_i i P_(i) of each row of probabilities (n, V); overwrites them."""
    n, v = p.shape
    ranks = torch.arange(v, 0, -1, dtype=p.dtype, device=p.device)  # of values in increasing order
    out = p.new_empty(n)
    rows = max(1, SORTED.get(p.device.type, SORTED_ELSEWHERE) // v)
    for part, result in zip(p.split(rows), out.split(rows), strict=True):
        if p.device.type == "cpu":  # in place, and four times as fast as torch
            part.numpy().sort(axis=-1)
        else:
            part = part.sort(-1).values
        torch.mv(part, ranks, out=result)
    return out


def _kernels(like: Tensor) -> Any:
    """The Triton kernels of scoring where they act on tensors like this one."""
    if not use_triton(like):
        return None
    from .kernels import scores

    return scores


def _restricted(z: Tensor, support: Tensor) -> Tensor:
    """The logits (n, K) of the tokens of `support`, -inf in its padding."""
    return z.gather(-1, support.clamp_min(0).long()).masked_fill_(support < 0, -math.inf)


def _taken(log_p: Tensor, support: Tensor, tokens: Tensor) -> Tensor:
    """Of log-probs (n, K) over the support, those of the tokens."""
    return log_p.masked_fill(support != tokens[:, None], 0).sum(-1)


class Score(torch.autograd.Function):
    """Log-probs and entropies with their gradients; the sampler's log-probs and ranks without. Keeps no logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        support: Tensor | None,
        head: Head,
        factor: Factor | None,
        with_rank: bool,
        with_expected_rank: bool,
    ) -> tuple[Tensor | None, ...]:
        """The fields of `hapo.scoring.Scores`, but for `beside`."""
        h, w = hidden.to(head.operand), weight.to(head.operand)
        logp = h.new_empty(len(h), dtype=head.accumulator)
        entropy = torch.empty_like(logp)
        sampler_logp = None if factor is None else torch.empty_like(logp)
        rank = torch.empty_like(logp) if with_rank else None
        expected_rank = torch.empty_like(logp) if with_expected_rank else None
        kernels = _kernels(logp)
        normaliser = None if kernels is None else torch.empty_like(logp)
        z_buffer = head.buffer(h, w)
        spare = head.buffer(h, w) if kernels is None or with_expected_rank else None
        for rows in head.chunks(len(h)):
            n, taken = rows.stop - rows.start, tokens[rows]
            z = head.logits_(z_buffer[:n], h[rows], w, bias)
            within = None if support is None else _restricted(z, support[rows])
            if rank is not None:
                rank[rows] = torch.count_nonzero(z >= z.gather(-1, taken[:, None]), -1)
            if kernels is not None and normaliser is not None:
                logp[rows], entropy[rows], normaliser[rows] = kernels.scores(z, taken)
            else:
                assert spare is not None
                log_p = torch.log_softmax(z, -1, out=spare[:n])
                logp[rows] = log_p.gather(-1, taken[:, None]).squeeze(-1)
                entropy[rows] = torch.exp(log_p, out=z).mul_(log_p.clamp_min_(IMPOSSIBLE)).sum(-1).neg_()
            if within is not None and support is not None:
                logp[rows] = _taken(within.log_softmax(-1), support[rows], taken)
            if expected_rank is not None and spare is not None:
                if kernels is None:
                    p = torch.exp(log_p, out=z)
                else:  # the sampler's kernel still reads z
                    p = torch.softmax(z, -1, out=spare[:n])
                expected_rank[rows] = _expected_rank_(p)
            if factor is not None and sampler_logp is not None:
                cooler = 1 / factor(entropy[rows])
                if within is not None and support is not None:
                    tempered = within.mul_(cooler[:, None]).log_softmax(-1)
                    sampler_logp[rows] = _taken(tempered, support[rows], taken)
                elif kernels is not None:
                    sampler_logp[rows] = kernels.scores(z, taken, cooler.float())[0]
                else:
                    log_p = torch.log_softmax(log_p.mul_(cooler[:, None]), -1, out=z)
                    sampler_logp[rows] = log_p.gather(-1, taken[:, None]).squeeze(-1)
        ctx.save_for_backward(hidden, weight, bias, tokens, support, entropy, normaliser)
        ctx.head = head
        ctx.set_materialize_grads(False)
        detached = sampler_logp, rank, expected_rank
        ctx.mark_non_differentiable(*(x for x in detached if x is not None))
        return logp, entropy, *detached

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weight and bias; the logits are made once more."""
        hidden, weight, bias, tokens, support, entropy, normaliser = ctx.saved_tensors
        head: Head = ctx.head
        h, w = hidden.to(head.operand), weight.to(head.operand)
        grads = [
            torch.zeros_like(x, dtype=head.accumulator) if needed else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        grad_hidden, grad_weight, grad_bias = grads
        slope = head.scale / head.t_base
        to_logp = torch.zeros_like(entropy) if grad_logp is None else grad_logp * slope
        to_entropy = None if grad_entropy is None else grad_entropy * slope
        kernels = _kernels(entropy)
        # A kernel writes the logits' gradient as the operand of the products that follow, but for the cap's slope.
        rounded = head.operand if kernels is not None and head.softcap is None else head.accumulator
        z_buffer, g_buffer = head.buffer(h, w), head.buffer(h, w, rounded)
        p_buffer = None if to_entropy is None or kernels is not None else head.buffer(h, w)
        for rows in head.chunks(len(h)):
            n, a = rows.stop - rows.start, to_logp[rows, None]
            b = None if to_entropy is None else to_entropy[rows, None]
            z, g = z_buffer[:n], g_buffer[:n]
            head.logits_(z, h[rows], w, bias)
            at, onto = tokens[rows, None], a
            if support is not None:  # of the log-probs, the whole vocabulary has no part
                within, a = _restricted(z, support[rows]), torch.zeros_like(a)
                at, drawn = support[rows].clamp_min(0).long(), support[rows] == at
                onto = onto * (drawn.to(within.dtype) - within.softmax(-1))  # padding: p is 0
            if support is not None and b is None:
                g.zero_()
            elif kernels is not None:
                flat = None if b is None else b.flatten()
                kernels.gradient(z, tokens[rows], normaliser[rows], entropy[rows], a.flatten(), flat, out=g)
            elif b is None or p_buffer is None:
                torch.softmax(z, -1, out=g).mul_(-a)
            else:  # -p (a + b (log p + H))
                p = torch.exp(torch.log_softmax(z, -1, out=g).clamp_min_(IMPOSSIBLE), out=p_buffer[:n])
                torch.addcmul(-a - b * entropy[rows, None], g, b, value=-1.0, out=g).mul_(p)
            if support is not None or kernels is None:
                g.scatter_add_(-1, at, onto.to(g.dtype))
            head.pull_back_(g, z)
            if grad_bias is not None:
                grad_bias += g.sum(0, dtype=grad_bias.dtype)
            g = g.to(head.operand)
            if grad_hidden is not None:
                head.addmm_(grad_hidden[rows], g, w, beta=0.0)
            if grad_weight is not None:
                head.addmm_(grad_weight, g.t(), h[rows], beta=1.0)
        return (
            *(None if g is None else g.to(x.dtype) for g, x in zip(grads, (hidden, weight, bias), strict=True)),
            *(None,) * 6,
        )
