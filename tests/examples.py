"""The worked example that the method specs share."""

import torch

import hapo

GROUP = torch.tensor([0, 0, 0, 0, 1, 1])
REWARD = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])


def padded(
    rows: list[list[float]], fill: float = float("nan"), dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Rows of unequal length as one tensor; padding is poisoned."""
    width = max(map(len, rows))
    return torch.tensor([r + [fill] * (width - len(r)) for r in rows], dtype=dtype)


OLD = [
    [-1.0, -0.2, -0.7, -0.5],
    [-1.5, -0.4],
    [-0.05, -2.0, -0.6],
    [-0.3, -0.9],
    [-0.8, -0.1, -0.05],
    [-0.6, -1.8],
]
NEW = [
    [-0.8, -0.35, -0.65, -0.15],
    [-1.8, -0.3],
    [-0.03, -2.25, -0.2],
    [-0.3, -1.1],
    [-0.7, -0.15, -0.05],
    [-0.35, -2.2],
]
REF = [
    [-0.9, -0.2, -0.75, -0.45],
    [-1.3, -0.5],
    [-0.05, -1.7, -0.8],
    [-0.25, -0.8],
    [-0.8, -0.08, -0.08],
    [-0.7, -1.65],
]
ENTROPY = [[1.2, 0.05, 0.6, 0.02], [0.9, 0.3], [0.01, 2.0, 0.4], [0.15, 0.25], [0.7, 0.08, 0.03], [0.5, 1.5]]


def worked_batch(**changes) -> hapo.TokenBatch:
    """The batch of grpo.md, dapo.md and hapo.md, NaN at padding, logp with a gradient."""
    batch = hapo.TokenBatch(
        mask=~padded(OLD).isnan(),
        old_logp=padded(OLD),
        logp=padded(NEW).requires_grad_(),
        ref_logp=padded(REF),
        old_entropy=padded(ENTROPY),
        reward=REWARD,
        group=GROUP,
    )
    return batch.replace(**changes)


def loss_and_grad(method: hapo.Method, batch: hapo.TokenBatch) -> tuple[float, torch.Tensor, hapo.LossOutput]:
    """prepare, loss, backward: the loss, d loss / d logp, and the output."""
    out = method.loss(method.prepare(batch))
    (grad,) = torch.autograd.grad(out.loss, batch.logp)
    return out.loss.item(), grad, out
