"""Tokens that truncated sampling left to each draw: whether log-probs are taken over them, and their way to them.

top-p, top-k and min-p draw from p / p(S) on the tokens S that they leave. Log-probs over the whole vocabulary miss
that factor, so a weight exp(old - sampler) has the mean p(S) and not 1 (trl#6789). Where S is known, all
log-probs are taken over it.

TRL hands log-probs on as lists of numbers, and cuts and joins them where a model calls tools. So the support goes
with the number: `LogpOver`.

Shapes: B sequences, T tokens, K tokens of the largest support.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from trl import GRPOConfig

from ...samplers.decoding import MOST_SUPPORT

TRUNCATIONS = {"top_p": 1.0, "top_k": 0, "min_p": None}
"""TRL's options that leave out tokens -> the value at which they do not."""


class LogpOver(float):
    """A log-prob in nats, with the tokens that it is over."""

    support: Sequence[int]

    def __new__(cls, logp: float, support: Sequence[int]) -> LogpOver:
        """Of one drawn token; `support` without padding."""
        self = super().__new__(cls, logp)
        self.support = support
        return self

    def __getnewargs__(self) -> tuple[float, Sequence[int]]:  # type: ignore[override]
        """What a copy in another process is made of."""
        return float(self), self.support


def over(logps: list[list[float]], support: Int[Tensor, "B T K"]) -> list[list[float]]:
    """Log-probs with their supports, the first of each row."""
    rows = zip(logps, support.tolist(), strict=True)
    return [
        [LogpOver(x, [t for t in s if t >= 0]) for x, s in zip(row, of_row, strict=False)] for row, of_row in rows
    ]


def support_of(
    logps: Sequence[Sequence[float]],
    own: Sequence[Sequence[int]] | None,
    ids: Int[Tensor, "B T"],
) -> Int[Tensor, "B T K"]:
    """Supports of the tokens of a rollout, -1 for padding; of what the policy did not write, the token alone.

    Args:
        logps: of each token of each response, with its support where the policy wrote it.
        own: 1 where the policy wrote the token, of each; None: all.
        ids: the tokens, padded on the right.

    Raises:
        RuntimeError: the engine told no log-prob, or no support, of a token.
    """
    sets: list[list[Sequence[int]]] = []
    for row, of_row in enumerate(logps):
        written = own[row] if own is not None else [1] * len(of_row)
        untold = [t for t, x in enumerate(of_row) if written[t] and not isinstance(x, LogpOver)]
        if untold:
            raise RuntimeError(
                f"token {untold[0]} of response {row} came without the tokens that it was drawn from (its "
                f"log-prob is {of_row[untold[0]]}): set sampling_support=False"
            )
        sets.append([x.support if isinstance(x, LogpOver) else () for x in of_row])
    sizes = torch.zeros(ids.shape, dtype=torch.long)
    for row, of_row_sets in enumerate(sets):
        sizes[row, : len(of_row_sets)] = torch.tensor([len(s) for s in of_row_sets], dtype=torch.long)
    most = max(1, int(sizes.max()))
    flat = torch.tensor([*chain.from_iterable(chain.from_iterable(sets))], dtype=torch.int32)
    out = torch.full((*ids.shape, most), -1, dtype=torch.int32)
    out[torch.arange(most) < sizes[..., None]] = flat
    out = out.to(ids.device)
    out[..., 0] = torch.where(sizes.to(ids.device) == 0, ids.int(), out[..., 0])
    return out


class RolloutSupport:
    """The supports of the rollout at work, once its tokens are drawn and padded."""

    def __init__(self) -> None:
        self._drawn: tuple[Any, Any] | None = None
        self._support: Tensor | None = None

    def take(self, *, logps: Any, own: Any) -> None:
        """What was drawn, as `support_of` takes it."""
        self._drawn = logps, own

    def of(self, ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T K"] | None:
        """Those of these tokens, all of the rollout; None where nothing was taken."""
        if self._support is None and self._drawn is not None:
            self._support = support_of(*self._drawn, ids)
        return self._support


def truncations(args: GRPOConfig) -> list[str]:
    """What of the options leaves out tokens, as `name=value`."""
    given = {name: getattr(args, name) for name in TRUNCATIONS}
    return [f"{name}={x}" for name, x in given.items() if x not in (TRUNCATIONS[name], None, 0)]


def decide(asked: bool | None, args: Any, reasons: Iterable[str]) -> bool:
    """Whether log-probs are taken over the supports, and a word where they are not though tokens are left out.

    Args:
        asked: what the user set; None: where it can be had.
        args: the options that draw.
        reasons: why it cannot be had, with the remedy.

    Raises:
        ValueError: it was asked for, or the rollouts are not scored, and it cannot be had.
    """
    why, cut = next(iter(reasons), None), truncations(args)
    if asked and not cut:
        raise ValueError(
            "sampling_support=True, and no token is left out: set top_k, top_p or min_p, or leave it away"
        )
    if asked and why is not None:
        raise ValueError(f"sampling_support=True cannot be honoured: {why}")
    if cut and not args.score_rollouts and (why is not None or asked is False):
        raise ValueError(
            f"score_rollouts=False with {', '.join(cut)} takes log-probs over what is left, and "
            f"{why or 'sampling_support=False rules them out: leave it away'}; or score the rollouts"
        )
    if cut and asked is None and why is not None:
        warnings.warn(
            f"{', '.join(cut)}: log-probs are over the whole vocabulary, so the mean importance weight is the "
            f"share that truncation leaves, not 1 ({why}); sampling_support=False says that this is meant",
            UserWarning,
            stacklevel=4,
        )
    return bool(cut) and asked is not False and why is None


def before_model(args: GRPOConfig, own_rollout: bool) -> Iterator[str]:
    """Why the options rule it out; `own_rollout`: a rollout function samples by itself."""
    if own_rollout:
        yield "a rollout_func samples by itself, and TRL takes no support from it: let the trainer generate"
    if args.use_transformers_continuous_batching and not args.use_vllm:
        yield "generate_batch() tells none: set use_transformers_continuous_batching=False"
    if args.top_k > MOST_SUPPORT:
        yield f"top_k={args.top_k} leaves too many tokens to keep: set it to at most {MOST_SUPPORT}"
    if args.use_vllm and args.top_k <= 0:
        yield "vLLM tells it with a bound on its size only: set top_k, 50 for instance"


def of_model(args: GRPOConfig, *, vocabulary: int, images: bool, router_loss: bool) -> Iterator[str]:
    """Why the model rules it out."""
    if args.top_k <= 0 and vocabulary > MOST_SUPPORT:
        yield f"of {vocabulary} tokens too many may be left: set top_k, to at most {MOST_SUPPORT}"
    if images:
        yield "images are scored by TRL's own pass, over the whole vocabulary: take a model of text"
    if router_loss:
        yield "a router loss comes with TRL's own pass, over the whole vocabulary: set router_aux_loss_coef=0"
