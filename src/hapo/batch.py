"""The token contract: what every part of the library reads.

Shapes: B sequences, T tokens. Log-probabilities and entropies are in nats, of softmax(logits / T_base).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TOKEN_FIELDS = (
    "old_logp",
    "logp",
    "ref_logp",
    "sampler_logp",
    "old_entropy",
    "entropy",
    "rank",
    "expected_rank",
    "token_reward",
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
    """Responses, or targets of demonstrations, as padded tensors. Immutable: every operation returns a new batch.

    The mask alone is required of every batch: a policy method reads `old_logp`, `reward` and `group` beside it, a
    supervised one `logp` and what its weight asks for. What stands at masked positions is never read. `logp` is
    the only tensor with a gradient. `advantage`, `signal`, `weight`, `keep`, `stats` and `totals` are made by
    `Method.prepare` and `Method.step` and are constants from then on. `hapo.stage.Record` is what the stages of a
    method see of it.

    Raises:
        ValueError: a field has another shape, dtype or device than the contract says, named in the message.
    """

    mask: Bool[Tensor, "B T"]
    """Valid response tokens: end of sequence included; prompt, padding and tool output not."""
    old_logp: Float[Tensor, "B T"] | None = None
    """Log-probability of the taken token under the policy at rollout."""
    reward: Float[Tensor, " B"] | None = None
    """Outcome reward of the response, with any length penalty; NaN where it could not be scored."""
    group: Int[Tensor, " B"] | None = None
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
    rank: Float[Tensor, "B T"] | None = None
    """Rank of the taken token in the current policy: 1 is the likeliest; tokens of equal probability count."""
    expected_rank: Float[Tensor, "B T"] | None = None
    """Rank that the current policy expects of a token that it draws: sum_i i P_(i), P in decreasing order."""
    verdict: Float[Tensor, " B"] | None = None
    """The verifier's verdict before any shaping; group filtering acts on it. `reward` where absent."""
    rewards: Float[Tensor, "B K"] | None = None
    """The reward of each of K functions, before weights and sum, NaN where one does not apply; GDPO reads them."""
    token_reward: Float[Tensor, "B T"] | None = None
    """Reward of each token, where the reward side attributes one: process rewards, shaped rewards. A row with a
    NaN at a valid place could not be scored."""
    turn: Int[Tensor, "B T"] | None = None
    """Number of the turn of an episode that a token is of, from 0; runs of valid tokens where absent."""
    advantage: Float[Tensor, "B T"] | None = None
    """What the token earned relative to its group."""
    signal: Float[Tensor, "B T"] | None = None
    """The method's number per token; HAPO: h in [-1, 1]."""
    weight: Float[Tensor, "B T"] | None = None
    """Factor on the token's loss; the truncated importance correction."""
    keep: Bool[Tensor, "B T"] | None = None
    """Tokens of `mask` that enter the loss; all of them where absent."""
    stats: EntropyStats | None = None
    """Entropy statistics of the rollout batch; the next rollout's temperature rule reads them."""
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
            per_token = f.name in TOKEN_FIELDS or f.name in ("keep", "turn")
            expected: tuple[int, ...] = (b, t) if per_token else (b,)
            if f.name == "rewards":
                expected = (b, *value.shape[1:2]) if value.ndim == 2 else (b, 1)
            if tuple(value.shape) != expected:
                raise ValueError(f"{f.name} has shape {tuple(value.shape)}, expected {expected} as mask says")
            if value.device != self.mask.device:
                raise ValueError(f"{f.name} is on {value.device}, mask on {self.mask.device}; move them together")
            if f.name == "keep":
                if value.dtype != torch.bool:
                    raise ValueError(f"keep must be a bool tensor, got {value.dtype}")
                continue
            if f.name in ("group", "turn"):
                if value.is_floating_point() or value.is_complex():
                    what = "prompt ids" if f.name == "group" else "numbers of turns"
                    raise ValueError(f"{f.name} holds {what} and must be an integer tensor, got {value.dtype}")
            elif not value.is_floating_point():
                raise ValueError(f"{f.name} must be a floating-point tensor, got {value.dtype}")

    def __len__(self) -> int:
        return self.mask.shape[0]

    @property
    def scored(self) -> Bool[Tensor, " B"]:
        """True at the rows that could be scored: neither reward nor verdict is NaN, nor the reward of a token.

        Raises:
            ValueError: the batch has no rewards.
        """
        nan = self.outcome.isnan()
        if self.token_reward is not None:
            nan = nan | (self.token_reward.isnan() & self.mask).any(-1)
        return ~(nan if self.verdict is None else nan | self.verdict.isnan())

    @property
    def outcome(self) -> Float[Tensor, " B"]:
        """`reward`; where only `token_reward` was given, its sum over the valid tokens of each row.

        Raises:
            ValueError: the batch has no rewards.
        """
        if self.reward is not None:
            return self.reward
        if self.token_reward is None:
            raise ValueError("the batch has no rewards: TokenBatch.reward and TokenBatch.token_reward are missing")
        per_token = masked(self.token_reward.detach(), self.mask)
        return per_token.double().sum(-1).to(per_token.dtype)

    def replace(self, **changes: Any) -> TokenBatch:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def count(self) -> StepTotals:
        """Totals of exactly these rows."""
        tokens = count_valid(self.mask)
        kept = tokens if self.keep is None else count_valid(self.mask & self.keep)
        return StepTotals(*torch.stack([(tokens > 0).sum(), tokens.sum(), kept.sum()]).tolist())

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


@dataclass(frozen=True)
class LossOutput:
    """What `Method.loss` and `Supervised.loss` return for a batch or a slice of it."""

    loss: Float[Tensor, ""]
    """This slice's share of the optimiser step's loss: the shares of all slices add up to it."""
    metrics: dict[str, Tensor]
    """Scalars, detached, shares like the loss: add them up over the slices of a step."""
    tokens: dict[str, Tensor] = field(repr=False)
    """Per token (B,T), detached. Of a policy method: ratio, advantage (as used), low and high bound, clipped,
    kept, and the signal where the method has one. Of a supervised one: weight."""


def working_dtype(x: Tensor) -> torch.dtype:
    """float32; float64 stays."""
    return torch.promote_types(x.dtype, torch.float32)


def masked(x: Float[Tensor, "B #T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """x in float32 (float64 stays) with zeros where the mask is False, whatever stood there.

    Differentiable in x, as often as one likes; where the mask is False the gradient is 0, even of NaN or inf.

    Raises:
        ValueError: x has other rows or columns than the mask; one of width 1 stands for all T columns.
    """
    if x.ndim != 2 or len(x) != len(mask) or x.shape[1] not in (1, mask.shape[1]):
        raise ValueError(f"a tensor has shape {tuple(x.shape)}, and the mask {tuple(mask.shape)}")
    return torch.where(mask, x.to(working_dtype(x)), 0.0)


def count_valid(mask: Bool[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """The valid entries of each row. On a CPU numpy counts, fifteen times as fast as torch; not under vmap."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=-1))
    return mask.sum(-1)


def valid(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " N"]:
    """The N valid entries, row by row, without autograd. On a CPU numpy is twenty times as fast as torch."""
    x = x.detach()
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(x.numpy()[mask.numpy()])
    return x[mask]
