"""Unmasking of masked-diffusion language models, block by block, the surest tokens first, as in LLaDA and Dream.

Shapes: B prompts of P columns, L positions of a response, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..masked import masked_logits

Order = Literal["confidence", "entropy", "random"]


@dataclass(frozen=True, kw_only=True)
class Unmasking:
    """How a response is unmasked.

    Raises:
        ValueError: blocks do not fill the length, or steps do not fill the blocks; or a value is out of its range.
    """

    length: int
    """L, positions of every response."""
    block: int | None = None
    """Positions that are finished before the next ones begin, from the left; None: all of them at once."""
    steps: int | None = None
    """Forward passes in all, spread evenly over the blocks; None: one a token."""
    order: Order = "confidence"
    """Which tokens stay: those of the highest probability (LLaDA), from the distribution of least entropy (Dream's
    `entropy`), or any."""
    temperature: float = 1.0
    """Of the draw; 0 takes the likeliest token. The order goes by the model's own probabilities at temperature
    1."""

    def __post_init__(self) -> None:
        """Check that blocks and steps fit."""
        if self.length < 1 or self.block_length < 1 or self.length % self.block_length:
            raise ValueError(
                f"blocks of {self.block_length} do not fill a response of {self.length}: choose a divisor of it"
            )
        if not 1 <= self.all_steps <= self.length or self.all_steps % self.blocks:
            raise ValueError(
                f"{self.all_steps} steps cannot be spread over {self.blocks} blocks of {self.block_length}: "
                f"choose a multiple of {self.blocks} up to {self.length}"
            )
        if self.order not in ("confidence", "entropy", "random"):
            raise ValueError(f"order must be 'confidence', 'entropy' or 'random', got {self.order!r}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")

    @property
    def block_length(self) -> int:
        """Positions of a block."""
        return self.length if self.block is None else self.block

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.length // self.block_length

    @property
    def all_steps(self) -> int:
        """Forward passes of a response that does not end early."""
        return self.length if self.steps is None else self.steps

    @property
    def counts(self) -> list[int]:
        """Tokens unmasked in each step of a block, the larger numbers first."""
        steps = self.all_steps // self.blocks
        least, rest = divmod(self.block_length, steps)
        return [least + (i < rest) for i in range(steps)]


class Decoded(NamedTuple):
    """Responses, and how they came about."""

    ids: Int[Tensor, "B L"]
    """Tokens, all L of them: also those after an end of sequence."""
    step: Int[Tensor, "B L"]
    """Forward pass, from 0, in which the token was unmasked; -1 where a response had ended before it."""
    confidence: Float[Tensor, "B L"]
    """The model's probability of the token in that pass; 1 where the response had ended."""


@torch.no_grad()
def decode(
    net: Any,
    prompt_ids: Int[Tensor, "B P"],
    prompt_mask: Int[Tensor, "B P"],
    how: Unmasking,
    *,
    mask_id: int,
    eos_ids: Sequence[int] = (),
    shifted: bool = False,
    generator: torch.Generator | None = None,
) -> Decoded:
    """Responses to left-padded prompts.

    The mask token is never drawn. A row of which a whole block is end of sequence has ended: the rest of it is end
    of sequence too, and it is run no further.

    Args:
        net: the model, without wrappers but PEFT's, in the mode in which it is to run.
        prompt_ids: padded on the left.
        prompt_mask: 0 at padding.
        how: blocks, steps, order, temperature.
        mask_id: the token that hides others.
        eos_ids: ids that end a sequence; without any no row ends early.
        shifted: the model says at k - 1 what stands at k (`hapo.masked.predicts_next`).
        generator: of the draws; None: torch's own.

    Raises:
        ValueError: the logits cannot be asked for at some positions alone (`hapo.masked`).
    """
    rows, width = prompt_ids.shape
    device = prompt_ids.device
    ids = torch.cat([prompt_ids, prompt_ids.new_full((rows, how.length), mask_id)], 1)
    attention = torch.cat([prompt_mask, prompt_mask.new_ones(rows, how.length)], 1)
    step = torch.full((rows, how.length), -1, device=device)
    confidence = torch.ones(rows, how.length, device=device)
    ends = torch.tensor([*eos_ids], dtype=torch.long, device=device)
    alive = torch.arange(rows, device=device)
    for block in range(how.blocks):
        first, last = block * how.block_length, (block + 1) * how.block_length
        for i, count in enumerate(how.counts):
            shown = ids[alive]
            logits = masked_logits(net, shown, attention[alive], width + first, width + last, shifted=shifted)
            logits[..., mask_id] = -torch.inf
            drawn, probability, surest = _draw(logits, how, generator)
            hidden = step[alive, first:last] < 0
            chosen = surest.masked_fill(~hidden, -torch.inf).topk(count, dim=1).indices
            at = alive.unsqueeze(1), first + chosen
            ids[at[0], width + at[1]] = drawn.gather(1, chosen)
            step[at] = block * len(how.counts) + i
            confidence[at] = probability.gather(1, chosen)
        ended = torch.isin(ids[alive, width + first : width + last], ends).all(1)
        over = alive[ended]
        ids[over, width + last :] = ids[over, width + last - 1].unsqueeze(1)
        alive = alive[~ended]
        if not len(alive):
            break
    return Decoded(ids[:, width:], step, confidence)


def _draw(
    logits: Float[Tensor, "B N V"], how: Unmasking, generator: torch.Generator | None
) -> tuple[Int[Tensor, "B N"], Float[Tensor, "B N"], Float[Tensor, "B N"]]:
    """A token of each position, its probability, and how sure the model is: the surest stay."""
    logp = logits.log_softmax(-1)
    if how.temperature == 0:
        tokens = logp.argmax(-1)
    else:  # the largest of the log-probs with Gumbel noise is a draw; in double, where no noise is infinite
        noise = torch.empty_like(logp, dtype=torch.float64).exponential_(generator=generator)
        tokens = (logp.double() / how.temperature - noise.log()).argmax(-1)
    probability = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).exp()
    if how.order == "confidence":
        return tokens, probability, probability
    if how.order == "entropy":
        p = logp.exp()
        return tokens, probability, torch.where(p > 0, p * logp, 0.0).sum(-1)
    sure = torch.rand(probability.shape, device=logits.device, generator=generator)
    return tokens, probability, sure
