"""The token contract: what every part of the library reads.

Shapes: B sequences, T tokens. Log-probabilities and entropies are in nats, of softmax(logits / T_base).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK = 1 << 19
"""Tokens that a CPU works on at once: the tensors of a block, 2 MiB each in float32, stay in its cache."""

TOKEN_FIELDS = (
    "old_logp",
    "logp",
    "ref_logp",
    "sampler_logp",
    "old_entropy",
    "entropy",
    "advantage",
    "signal",
    "weight",
)


@dataclass(frozen=True)
class EntropyStats:
    """Statistics of the log-entropy over the valid tokens of one rollout batch (HAPO, eqs. 5-7).

    They make the signal h of that batch and, one rollout batch later, the sampling temperature.
    """

    pivot: float
    """rho-quantile of log entropy, log-nats; an actual token's value."""
    sigma: float
    """Population standard deviation of log entropy about its mean, log-nats."""
    h_max: float
    """Largest distance above the pivot, log-nats, >= 0."""
    h_min: float
    """Largest distance below the pivot as a negative number, log-nats, <= 0."""
    tokens: int = 0
    """Number of tokens that the statistics were taken over."""
    floored: float = 0.0
    """Share of those tokens whose entropy was at or below the floor 1e-8."""

    def to_dict(self) -> dict[str, float]:
        """Plain numbers, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class StepTotals:
    """Counts of one optimiser step, over all its micro-batches and ranks: the normalisers of the loss."""

    sequences: int
    """Rows with at least one valid token."""
    tokens: int
    """Valid tokens."""
    kept: int
    """Valid tokens that the method keeps in the loss."""

    def __add__(self, other: StepTotals) -> StepTotals:
        return StepTotals(self.sequences + other.sequences, self.tokens + other.tokens, self.kept + other.kept)


@dataclass(frozen=True)
class TokenBatch:
    """Responses as padded tensors. Immutable: every operation returns a new batch.

    What stands at masked positions is never read. `logp` is the only tensor with a gradient. `advantage`,
    `signal`, `weight`, `keep`, `stats` and `totals` are made by `Method.prepare` and `Method.step` and are
    constants from then on.

    Raises:
        ValueError: a field has another shape, dtype or device than the contract says, named in the message.
    """

    mask: Bool[Tensor, "B T"]
    """Valid response tokens: end of sequence included; prompt, padding and tool output not."""
    old_logp: Float[Tensor, "B T"]
    """Log-probability of the taken token under the policy at rollout."""
    reward: Float[Tensor, " B"]
    """Outcome reward of the response, with any length penalty; NaN where it could not be scored."""
    group: Int[Tensor, " B"]
    """Prompt id: rows with equal ids are samples of one prompt."""
    logp: Float[Tensor, "B T"] | None = None
    """Log-probability of the taken token under the current policy."""
    ref_logp: Float[Tensor, "B T"] | None = None
    """The same under the reference policy."""
    sampler_logp: Float[Tensor, "B T"] | None = None
    """The same under the distribution that really drew the token (adaptive temperature, top-p and all)."""
    old_entropy: Float[Tensor, "B T"] | None = None
    """Full-vocabulary entropy of the policy at rollout, nats."""
    entropy: Float[Tensor, "B T"] | None = None
    """Full-vocabulary entropy of the current policy, nats."""
    verdict: Float[Tensor, " B"] | None = None
    """The verifier's verdict before any shaping; group filtering acts on it. `reward` where absent."""
    advantage: Float[Tensor, "B T"] | None = None
    """What the token earned relative to its group."""
    signal: Float[Tensor, "B T"] | None = None
    """The method's number per token; HAPO: h in [-1, 1]."""
    weight: Float[Tensor, "B T"] | None = None
    """Factor on the token's loss; the truncated importance correction."""
    keep: Bool[Tensor, "B T"] | None = None
    """Tokens of `mask` that enter the loss; all of them where absent."""
    stats: EntropyStats | None = None
    """Entropy statistics of the rollout batch; the next rollout's temperature law reads them."""
    totals: StepTotals | None = None
    """Counts of the optimiser step that this batch is a slice of."""

    def __post_init__(self) -> None:
        """Check the contract at the door."""
        if self.mask.dtype != torch.bool or self.mask.ndim != 2:
            raise ValueError(
                f"mask must be a bool tensor of shape (B, T), got {self.mask.dtype} {tuple(self.mask.shape)}; "
                "convert with mask.bool()"
            )
        b, t = self.mask.shape
        for f in fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, Tensor) or f.name == "mask":
                continue
            expected = (b, t) if f.name in TOKEN_FIELDS or f.name == "keep" else (b,)
            if tuple(value.shape) != expected:
                raise ValueError(f"{f.name} has shape {tuple(value.shape)}, expected {expected} as mask says")
            if value.device != self.mask.device:
                raise ValueError(f"{f.name} is on {value.device}, mask on {self.mask.device}; move them together")
            if f.name == "keep":
                if value.dtype != torch.bool:
                    raise ValueError(f"keep must be a bool tensor, got {value.dtype}")
                continue
            if f.name == "group":
                if value.is_floating_point() or value.is_complex():
                    raise ValueError(f"group holds prompt ids and must be an integer tensor, got {value.dtype}")
            elif not value.is_floating_point():
                raise ValueError(f"{f.name} must be a floating-point tensor, got {value.dtype}")

    def __len__(self) -> int:
        return self.mask.shape[0]

    @property
    def scored(self) -> Bool[Tensor, " B"]:
        """True at the rows that could be scored: neither reward nor verdict is NaN."""
        nan = self.reward.isnan()
        return ~(nan if self.verdict is None else nan | self.verdict.isnan())

    def replace(self, **changes: Any) -> TokenBatch:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def count(self) -> StepTotals:
        """Totals of exactly these rows."""
        length = lengths(self.mask)
        kept = length if self.keep is None else lengths(self.mask & self.keep)
        return StepTotals(*torch.stack([(length > 0).sum(), length.sum(), kept.sum()]).tolist())

    def columns(self, width: int) -> TokenBatch:
        """The first columns; the step's totals stay."""
        tensors = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        return self.replace(**{name: x[:, :width] for name, x in tensors.items() if x.ndim == 2})

    def rows(self, index: slice | Tensor | list[int]) -> TokenBatch:
        """Some rows of the step, for one micro-batch: the step's totals stay, so that losses add up."""
        if isinstance(index, list):
            index = torch.tensor(index, dtype=torch.long, device=self.mask.device)
        by_number = isinstance(index, Tensor) and index.dtype == torch.long

        def chosen(x: Tensor) -> Tensor:
            # On a CPU a tenth of the time of indexing.
            return x.index_select(0, index) if by_number else x[index]  # type: ignore[arg-type]

        return self.replace(
            **{f.name: chosen(x) for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        )


def lengths(mask: Bool[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """Valid tokens of each row."""
    if mask.device.type == "cpu":  # numpy counts ten times as fast
        return torch.from_numpy(np.atleast_1d(np.count_nonzero(mask.numpy(), axis=1)))
    return mask.sum(-1)


def working_dtype(x: Tensor) -> torch.dtype:
    """float32; float64 stays."""
    return torch.promote_types(x.dtype, torch.float32)


def masked(x: Float[Tensor, "B #T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """x in float32 (float64 stays) with zeros where the mask is False, whatever stood there. No gradient."""
    return all_masked({"": x}, mask)[""]


def all_masked(
    tensors: dict[str, Float[Tensor, "B #T"]], mask: Bool[Tensor, "B T"]
) -> dict[str, Float[Tensor, "B T"]]:
    """`masked` of several tensors; one of width 1 stands for all T columns.

    By bits, so that NaN and inf become 0: on a CPU that takes a fifth of the time of `torch.where`.

    Raises:
        ValueError: a tensor has other rows or columns than the mask, with its name and both shapes.
    """
    for name, x in tensors.items():
        if x.ndim != 2 or len(x) != len(mask) or x.shape[1] not in (1, mask.shape[1]):
            raise ValueError(f"{name or 'a tensor'} has shape {tuple(x.shape)}, and the mask {tuple(mask.shape)}")
    tensors = {name: x.detach().to(working_dtype(x)) for name, x in tensors.items()}
    out = {name: x.new_empty(mask.shape) for name, x in tensors.items()}
    for rows in row_blocks(mask):
        of_size: dict[torch.dtype, Tensor] = {}
        for name, x in tensors.items():
            ints = torch.int64 if x.dtype == torch.float64 else torch.int32
            if ints not in of_size:
                of_size[ints] = mask[rows].to(ints).neg_()
            torch.bitwise_and(x[rows].view(ints), of_size[ints], out=out[name][rows].view(ints))
    return out


def valid(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " N"]:
    """The N valid entries, row by row, without autograd. On a CPU numpy is twenty times as fast as torch."""
    x = x.detach()
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(x.numpy()[mask.numpy()])
    return x[mask]


def compact_blocks(mask: Bool[Tensor, "B T"]) -> list[tuple[slice | Tensor, int]]:
    """All rows in blocks of about `BLOCK` tokens, each as rows and as many columns as these need.

    Rows of like length stand together, so that little padding is left. An accelerator takes all rows at once.
    """
    rows, width = mask.shape
    if mask.device.type != "cpu" or mask.numel() <= BLOCK:
        return [(slice(None), width)]
    last_first = mask.numpy()[:, ::-1]
    needed = np.where(last_first.any(1), width - last_first.argmax(1), 1)
    order = np.argsort(needed, kind="stable")
    blocks: list[tuple[slice | Tensor, int]] = []
    begin = 0
    for end in range(1, rows + 1):
        if end == rows or (end + 1 - begin) * needed[order[end]] > BLOCK:
            blocks.append((torch.from_numpy(order[begin:end]), int(needed[order[end - 1]])))
            begin = end
    return blocks


def row_blocks(mask: Bool[Tensor, "B T"]) -> list[slice]:
    """Rows in blocks of about `BLOCK` tokens, at least one block; an accelerator takes all rows at once."""
    rows, width = mask.shape
    blocks = math.ceil(rows * width / BLOCK) if mask.device.type == "cpu" else 1
    step = math.ceil(rows / max(blocks, 1)) or 1
    return [slice(i, i + step) for i in range(0, rows, step)] or [slice(0, 0)]
