"""The worked example that most methods share, and what the tests of worked examples need."""

import math

import torch

import hapo
from hapo.parts.bounds import Bounds
from hapo.stage import Record

Rows = list[list[float]]

GROUP = torch.tensor([0, 0, 0, 0, 1, 1])
REWARD = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])


def padded(rows: Rows, fill: float = math.nan, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of unequal length as one tensor; padding is poisoned."""
    width = max(map(len, rows))
    return torch.tensor([r + [fill] * (width - len(r)) for r in rows], dtype=dtype)


def logs(probabilities: Rows) -> Rows:
    """Log-probs of the taken tokens, where an example has probabilities."""
    return [[math.log(p) for p in row] for row in probabilities]


def on_tokens(values: list[float], like: Rows) -> Rows:
    """A number per response, on each of its tokens."""
    return [[v] * len(row) for v, row in zip(values, like, strict=True)]


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


def example(
    *,
    old: Rows,
    new: Rows,
    reward: list[float],
    group: list[int] | None = None,
    ref: Rows | None = None,
    entropy: Rows | None = None,
    dtype: torch.dtype = torch.float32,
) -> hapo.TokenBatch:
    """A batch of these rows, NaN at padding: one group unless told, one entropy for both policies."""
    mask = ~padded(old).isnan()
    entropies = None if entropy is None else padded(entropy, dtype=dtype)
    return hapo.TokenBatch(
        mask=mask,
        old_logp=padded(old, dtype=dtype),
        logp=padded(new, dtype=dtype).requires_grad_(),
        ref_logp=None if ref is None else padded(ref, dtype=dtype),
        old_entropy=entropies,
        entropy=entropies,
        reward=torch.tensor(reward, dtype=dtype),
        rewards=torch.tensor(reward, dtype=dtype).unsqueeze(1).expand(-1, 2),
        group=torch.zeros(len(mask), dtype=torch.long) if group is None else torch.tensor(group),
    )


def worked_batch(*, dtype: torch.dtype = torch.float32, **changes) -> hapo.TokenBatch:
    """The batch that most worked examples share, NaN at padding, logp with a gradient."""
    reward, group = REWARD.tolist(), GROUP.tolist()
    batch = example(old=OLD, new=NEW, reward=reward, group=group, ref=REF, entropy=ENTROPY, dtype=dtype)
    return batch.replace(**changes)


SHARES_H = [[0.8, 0.2, 0.5], [0.4, 0.4], [0.5, 1.0, 0.25], [0.25]]


def shares_batch() -> hapo.TokenBatch:
    """The batch of GTPO and GRPO-S: two right responses, two wrong ones, entropies SHARES_H."""
    old = [[0.5, 0.4, 0.6], [0.7, 0.5], [0.6, 0.3, 0.8], [0.9]]
    new = [[0.55, 0.5, 0.54], [0.7, 0.7], [0.54, 0.21, 0.88], [0.81]]
    return example(old=logs(old), new=logs(new), entropy=SHARES_H, reward=[1.0, 1.0, 0.0, 0.0])


def one_step(method: hapo.Method, batch: hapo.TokenBatch) -> hapo.TokenBatch:
    """The whole batch, prepared, as one optimiser step."""
    return method.step(method.prepare(batch))


def loss_and_grad(
    method: hapo.Method, batch: hapo.TokenBatch, advantage: torch.Tensor | None = None
) -> tuple[float, torch.Tensor, hapo.LossOutput]:
    """prepare, loss, backward: the loss, d loss / d logp, and the output. `advantage` overrides prepare()'s."""
    prepared = one_step(method, batch)
    if advantage is not None:
        prepared = method.step(prepared.replace(advantage=advantage))
    out = method.loss(prepared)
    (grad,) = torch.autograd.grad(out.loss, batch.logp)
    return out.loss.item(), grad, out


def token_losses(method: hapo.Method, batch: hapo.TokenBatch, out: hapo.LossOutput) -> torch.Tensor:
    """Each token's surrogate, which loss() reduces."""
    t = out.tokens
    record = Record(method.name, batch.replace(logp=batch.logp.detach(), advantage=t["advantage"]))
    record.ratio, record.bounds = t["ratio"], Bounds(t["low"], t["high"])
    return method.surrogate(record).loss


def close(actual: torch.Tensor, rows: Rows, mask: torch.Tensor | None = None, atol: float = 1e-6) -> None:
    """Equal to the printed figures, at the valid tokens where a mask is given, else with 0 at padding."""
    actual = actual if mask is None else torch.where(mask, actual, 0.0)
    torch.testing.assert_close(actual.double(), padded(rows, fill=0.0, dtype=torch.float64), rtol=0, atol=atol)


def on_policy(batch: hapo.TokenBatch) -> hapo.TokenBatch:
    return batch.replace(logp=batch.old_logp.clone().requires_grad_())


def one_token(batch: hapo.TokenBatch) -> hapo.TokenBatch:
    mask = batch.mask.clone()
    mask[:, 1:] = False
    return unclamped(batch.replace(mask=mask))


def right_or_wrong(batch: hapo.TokenBatch) -> hapo.TokenBatch:
    """Without rewards of empty rows, which GRPO-S leaves out of the group and GSPO does not."""
    return batch.replace(reward=batch.reward.clamp(0, 1).masked_fill(~batch.mask.any(-1), torch.nan))


def unclamped(batch: hapo.TokenBatch) -> hapo.TokenBatch:
    """Ratios within e^±9: beyond, the methods' numerical guards differ."""
    near = batch.old_logp + (batch.logp.detach() - batch.old_logp).clamp(-9, 9)
    return batch.replace(logp=near.requires_grad_())
