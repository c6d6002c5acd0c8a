"""What the scoring kernels compute, in a few lines of torch: the rows that they are compared with at first use.

float32, out of place; `hapo.scoring` has the same in place, for chunks of any size. Shapes: n positions, V
vocabulary.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def scores(
    logits: Float[Tensor, "n V"], tokens: Int[Tensor, " n"], scale: Float[Tensor, " n"] | None = None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """log p at the tokens, entropy and logsumexp, nats, of softmax(scale * logits); `scale` is positive."""
    z = logits.float()
    top = z.amax(-1, keepdim=True)
    z, top = (z - top, top) if scale is None else ((z - top) * scale[:, None], top * scale[:, None])
    log_p = z.log_softmax(-1)
    taken = log_p.gather(-1, tokens[:, None]).squeeze(-1)
    return taken, torch.special.entr(log_p.exp()).sum(-1), top.squeeze(-1) + z.logsumexp(-1)


def gradient(
    logits: Float[Tensor, "n V"],
    tokens: Int[Tensor, " n"],
    normaliser: Float[Tensor, " n"],
    entropy: Float[Tensor, " n"],
    to_logp: Float[Tensor, " n"],
    to_entropy: Float[Tensor, " n"] | None,
) -> Float[Tensor, "n V"]:
    """to_logp (onehot - p) - to_entropy p (log p + H), with log p = logits - normaliser."""
    log_p = logits.float() - normaliser[:, None]
    p = log_p.exp()
    a = to_logp[:, None]
    out = (-a * p).scatter_add_(-1, tokens[:, None], a.to(p.dtype))
    if to_entropy is not None:
        out -= to_entropy[:, None] * p * torch.where(p > 0, log_p + entropy[:, None], 0.0)  # 0 at -inf
    return out
