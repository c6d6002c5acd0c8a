"""Random batches, and the difference of two losses and of their gradients with respect to logp."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hapo import Method, TokenBatch

SEEDS = range(12)
TOLERANCE = 1e-6
LENGTHS = (1, 1, 2, 3, 5, 8, 8, 9, 11, 13, 14, 16, 16, 17, 19, 20)
GROUPS = {"ragged": (1, 2, 3, 4, 6), "even": (4, 4, 4, 4)}
EQUAL = {"ragged": 1, "even": 0}

Loss = Callable[[Tensor], Tensor]


def random_batch(seed: int, dtype: torch.dtype = torch.float64, groups: str = "ragged") -> TokenBatch:
    """Sixteen responses of at most 20 tokens; ratios from e^-3.5 to e^3.5, k3 below 5.

    "ragged": groups of 1, 2, 3, 4 and 6, the group of 2 with equal rewards. "even": four groups of 4, the first
    with equal rewards. The rows of a group stand together, as TRL has them. What a tool wrote is masked inside a
    response; masked positions hold arbitrary numbers.
    """
    g = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(GROUPS[groups])
    rows, width = len(LENGTHS), max(LENGTHS)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    length = torch.tensor(LENGTHS)[torch.randperm(rows, generator=g)]
    mask = torch.arange(width) < length.unsqueeze(1)
    mask[:, 1:] &= torch.rand(rows, width - 1, generator=g) > 0.1
    group = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    reward = torch.rand(rows, generator=g).double()
    reward = torch.where(group % 2 == 0, reward, (reward < 0.5).double())
    reward = torch.where(group == EQUAL[groups], 1.0, reward)
    old_logp = -4 - 2 * torch.rand(rows, width, generator=g, dtype=torch.float64)
    logp = old_logp + (0.3 * normal(rows, 1) + 0.8 * normal(rows, width)).clamp(-3.5, 3.5)
    tokens = {
        "old_logp": old_logp,
        "logp": logp,
        "ref_logp": logp + (0.6 * normal(rows, width)).clamp(-2, 2),
        "entropy": normal(rows, width).exp().float().double(),  # TRL takes quantiles in float32
    }
    return TokenBatch(
        mask=mask, group=group, reward=reward.to(dtype), **{name: x.to(dtype) for name, x in tokens.items()}
    )


def gradient(loss: Loss, logp: Tensor) -> tuple[Tensor, Tensor]:
    """The loss at logp, and its gradient there."""
    logp = logp.detach().clone().requires_grad_()
    value = loss(logp)
    return value.detach(), torch.autograd.grad(value, logp)[0]


def ours(method: Method, prepared: TokenBatch) -> Loss:
    """hapo's loss of a prepared batch, as a function of logp."""
    return lambda logp: method.loss(prepared.replace(logp=logp)).loss


def differences(theirs: Loss, our: Loss, logp: Tensor) -> tuple[float, float]:
    """Of the losses, absolute; of the gradients, the largest, relative to the largest entry of theirs."""
    value, grad = gradient(theirs, logp)
    our_value, our_grad = gradient(our, logp)
    assert grad.abs().max() > 0, "a gradient of zero shows nothing"
    return (value - our_value).abs().item(), ((grad - our_grad).abs().max() / grad.abs().max()).item()


def largest(measure: Callable[[TokenBatch], tuple[float, ...]], groups: str = "ragged") -> list[float]:
    """The largest of each difference over all batches: in float64, then in float32."""
    return [
        max(column)
        for dtype in (torch.float64, torch.float32)
        for column in zip(*(measure(random_batch(seed, dtype, groups)) for seed in SEEDS), strict=True)
    ]


def call(name: str, options: Mapping[str, object]) -> str:
    """A call as it would be written."""
    return f"`{name}({', '.join(f'{k}={v!r}' for k, v in options.items())})`"
