"""Method: one choice a stage, and the calls that a trainer makes: prepare(), step(), loss()."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from .batch import (
    TOKEN_FIELDS,
    EntropyStats,
    StepTotals,
    TokenBatch,
    all_masked,
    compact_blocks,
    lengths,
    masked,
    working_dtype,
)
from .parts.bounds import Bounds, constant_bounds
from .parts.entropy import entropy_from_logits
from .parts.keep import mixed_groups
from .parts.penalty import k3
from .parts.ratio import token_ratio, truncated_correction
from .parts.reduce import token_mean
from .parts.surrogate import Surrogate, clipped_surrogate


@dataclass(frozen=True)
class LossOutput:
    """What `Method.loss` returns for a batch or a slice of it."""

    loss: Float[Tensor, ""]
    """This slice's share of the optimiser step's loss: the shares of all slices add up to it."""
    metrics: dict[str, Tensor]
    """Scalars, detached, shares like the loss: add them up over the slices of a step."""
    _tokens: Callable[[], dict[str, Tensor]] = field(repr=False)

    @cached_property
    def tokens(self) -> dict[str, Tensor]:
        """Per token (B,T), detached: ratio, advantage (as used), low and high bound, clipped, and the signal where
        the method has one. Made when they are first asked for: training needs none of them."""
        return self._tokens()


class _Terms(NamedTuple):
    """What the loss stages make of some rows."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]
    tokens: dict[str, Tensor]


def _no_reshape(advantage: Tensor, ratio: Tensor, signal: Tensor | None, bounds: Bounds) -> Float[Tensor, "B T"]:
    return advantage


def _symmetric_bounds(ratio: Tensor, signal: Tensor | None) -> Bounds:
    return constant_bounds(ratio, 0.2, 0.2)


@dataclass(frozen=True, kw_only=True, repr=False)
class Method:
    """A policy-optimisation method as one choice a stage; every stage is a pure function on tensors.

    The prepare stages see a whole rollout batch, of all ranks; the step stage sees a whole optimiser step; what
    they return is frozen. The loss stages see whole rows of a step. Inside a method every tensor is float32
    (float64 stays) and zero outside the mask.
    """

    name: str
    advantage: Callable[[TokenBatch], Float[Tensor, "B T"]]
    """Prepare. The advantage of every valid token; sees signal and statistics."""
    filter_groups: bool = False
    """Prepare. Drop the rows of groups whose verdicts are all equal (DAPO's dynamic sampling)."""
    stats: Callable[[TokenBatch], EntropyStats | None] | None = None
    """Prepare. Entropy statistics of the rollout batch, for the signal and the next rollout's temperature."""
    signal: Callable[[TokenBatch], Float[Tensor, "B T"]] | None = None
    """Prepare, or with `live_signal` Loss. A number per token that later stages read."""
    live_signal: bool = False
    """Take the signal of the current policy's entropies, on whole rows, in loss()."""
    sampler_cap: float | None = 2.0
    """Prepare. Weight min(exp(old - sampler), cap) on tokens whose `sampler_logp` is known; None: no weight."""
    keep: Callable[[TokenBatch], Bool[Tensor, "B T"]] | None = None
    """Step. Tokens that enter the loss; sees what prepare made, so no live signal."""
    live_keep: bool = False
    """`keep` reads the current policy: step() needs logp and entropy of all rows of the step."""
    factor: Callable[[Tensor, EntropyStats], Tensor] | None = None
    """Sampling. Factor on T_base as a function of the entropy; None: T = T_base."""
    ratio: Callable[[Tensor, Tensor, Tensor], Float[Tensor, "B T"]] = token_ratio
    """Loss. (logp, old_logp, mask) -> importance ratio, differentiable in logp."""
    bounds: Callable[[Tensor, Tensor | None], Bounds] = _symmetric_bounds
    """Loss. (ratio, signal) -> clip bounds."""
    reshape: Callable[[Tensor, Tensor, Tensor | None, Bounds], Float[Tensor, "B T"]] = _no_reshape
    """Loss. (advantage, ratio, signal, bounds) -> advantage as used; the ratio is a constant here."""
    surrogate: Callable[[Tensor, Tensor, Tensor, Bounds], Surrogate] = clipped_surrogate
    """Loss. (logp, ratio, advantage, bounds) -> per-token loss."""
    kl_coef: float | Callable[[Tensor | None, Tensor], Float[Tensor, "B T"]] = 0.0
    """Loss. Weight of the k3 penalty towards the reference policy, which needs `ref_logp`: a number, or
    (signal, mask) -> a number per token."""
    reduce: Callable[[Tensor, Tensor, StepTotals], Float[Tensor, ""]] = token_mean
    """Loss. (loss, mask, totals) -> scalar, normalised by the totals of the optimiser step."""
    breaks: frozenset[str] = frozenset()
    """Laws that these choices break by their definition: "split", or "detach" where the loss holds
    stop-gradients, so that its gradient is not the derivative of its value."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options it was built from, for records and checkpoints."""

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items() if k != "method")
        return f"Method({self.name!r}{', ' if options else ''}{options})"

    def replace(self, **changes: Any) -> Method:
        """A copy with other choices for some stages; its options say which, so that records and checkpoints do."""
        if self.options and "options" not in changes:
            kept = {k: v for k, v in self.options.items() if k not in changes}
            changes["options"] = {**kept, "replaced": sorted({*kept.get("replaced", ()), *changes})}
        return replace(self, **changes)

    def prepare(self, batch: TokenBatch) -> TokenBatch:
        """Advantage, signal and weight of a rollout batch, frozen; statistics. Then step(), as one step.

        A row whose reward or verdict is NaN could not be scored: it is in no statistic, its tokens are masked.

        Call it once on the whole rollout batch, all ranks together: group means, statistics and advantages are
        taken here and nowhere else. Where the rollout batch is used for several optimiser steps, call `step` on
        the rows of each. With `live_keep` no step is made here: `step` must be called in any case.

        Raises:
            ValueError: a field that this method reads is missing.
        """
        batch = batch.replace(**dict.fromkeys(("advantage", "signal", "weight", "keep", "stats", "totals")))
        used = scored = batch.scored
        if self.filter_groups:
            used = mixed_groups(batch.reward if batch.verdict is None else batch.verdict, batch.group, scored)
        batch = batch.replace(
            mask=batch.mask & used.unsqueeze(1), reward=batch.reward.masked_fill(~scored, torch.nan)
        )
        batch = _clean(batch, [name for name in TOKEN_FIELDS if name not in _CURRENT])
        if self.stats is not None:
            self._need(batch, "old_entropy")
            batch = batch.replace(stats=self.stats(batch))
        if self.signal is not None and not self.live_signal:
            self._need(batch, "old_entropy")
            batch = batch.replace(signal=masked(self.signal(batch).detach(), batch.mask))
        batch = batch.replace(advantage=masked(self.advantage(batch).detach(), batch.mask))
        if self.sampler_cap is not None and batch.sampler_logp is not None:
            weight = truncated_correction(batch.old_logp, batch.sampler_logp, self.sampler_cap)
            batch = batch.replace(weight=masked(weight.detach(), batch.mask))
        return batch if self.live_keep else self.step(batch)

    def step(self, batch: TokenBatch) -> TokenBatch:
        """These rows of a prepared batch as one optimiser step: the tokens that it keeps, and its totals, frozen.

        Call it on all rows of the step, all ranks together. Where the method keeps tokens by the current policy
        (`live_keep`), `logp` and `entropy` must be the current policy's.

        Raises:
            ValueError: the batch was not prepared, or a field that this method reads is missing.
        """
        if batch.advantage is None:
            raise ValueError("step() got a batch without advantages: call method.prepare(batch) first")
        keep = None
        if self.keep is not None:
            for name in ("logp", "entropy") if self.live_keep else ():
                self._need(batch, name)
            with torch.no_grad():
                keep = self.keep(_clean(batch)) & batch.mask
        return batch.replace(keep=keep, totals=batch.replace(keep=keep).count())

    def loss(self, batch: TokenBatch) -> LossOutput:
        """Loss of an optimiser step, or of any slice of it (`batch.rows(...)`); see `LossOutput`.

        Differentiable in `batch.logp` alone, once: the gradient is taken together with the value, over blocks of
        rows that fit a processor's cache. An empty batch has loss 0 and gradient 0.

        Raises:
            ValueError: the batch was not prepared, or a field that this method reads is missing.
        """
        if batch.advantage is None:
            raise ValueError("loss() got a batch without advantages: call method.prepare(batch) first")
        if batch.totals is None or (self.keep is not None and batch.keep is None):
            what = "keeps tokens by the current policy" if self.live_keep else "did not prepare this batch"
            raise ValueError(
                f"method {self.name!r} {what}: call method.step(batch) on all rows of the optimiser step, after "
                "prepare() and before loss()"
            )
        if batch.logp is None:
            raise ValueError("loss() needs TokenBatch.logp, the log-probs under the current policy")
        if self.signal is not None and not self.live_signal and batch.signal is None:
            raise ValueError(f"this batch was not prepared by {self.name!r}: it has no signal")
        whole: list[tuple[slice | Tensor, int]] = [(slice(None), batch.mask.shape[1])]
        frozen = batch.replace(logp=batch.logp.detach())
        read = [name for name in TOKEN_FIELDS if self.live_signal or name not in _ENTROPIES]
        needs_grad = torch.is_grad_enabled() and batch.logp.requires_grad
        gradient = torch.zeros_like(batch.logp, dtype=working_dtype(batch.logp)) if needs_grad else None
        metrics: dict[str, Tensor] = {}
        for rows, width in whole if "split" in self.breaks else compact_blocks(batch.mask):
            part = _clean(frozen if isinstance(rows, slice) else frozen.columns(width).rows(rows), read)
            assert part.logp is not None
            with torch.set_grad_enabled(needs_grad):
                terms = self._terms(part.replace(logp=part.logp.requires_grad_(needs_grad)))
            if gradient is not None:
                (gradient[rows, :width],) = torch.autograd.grad(terms.loss, part.logp, materialize_grads=True)
            for name, value in {"loss": terms.loss.detach(), **terms.metrics}.items():
                metrics[name] = metrics[name] + value if name in metrics else value
        loss = metrics["loss"]
        if gradient is not None:
            loss = _WithGradient.apply(batch.logp, loss, gradient)

        def tokens() -> dict[str, Tensor]:
            with torch.no_grad():
                return self._terms(_clean(frozen, read)).tokens

        return LossOutput(loss, metrics, tokens)

    def _terms(self, batch: TokenBatch) -> _Terms:
        """The loss stages on clean rows."""
        assert batch.logp is not None and batch.advantage is not None and batch.totals is not None
        signal = batch.signal
        if self.signal is not None and self.live_signal:
            signal = masked(self.signal(batch), batch.mask)
        ratio = self.ratio(batch.logp, batch.old_logp, batch.mask)
        bounds = self.bounds(ratio.detach(), signal)
        advantage = self.reshape(batch.advantage, ratio.detach(), signal, bounds).detach()
        surrogate = self.surrogate(batch.logp, ratio, advantage, bounds)
        loss = surrogate.loss if batch.weight is None else surrogate.loss * batch.weight
        kept = batch.mask if batch.keep is None else batch.mask & batch.keep
        total = self.reduce(loss, kept, batch.totals)
        per_token = {
            "ratio": ratio.detach(),
            "clip/low": surrogate.clipped_low & kept,
            "clip/high": surrogate.clipped_high & kept,
            "kl_old": k3(batch.old_logp, batch.logp.detach()),
        }
        if batch.weight is not None:
            per_token["sampler_weight"] = batch.weight
        if batch.keep is not None:
            per_token["kept"] = kept
        if self.reshape is not _no_reshape:
            per_token["reshaped"] = (advantage != batch.advantage) & batch.mask
        if batch.ref_logp is not None:
            per_token["kl"] = k3(batch.logp, batch.ref_logp)
        if self.kl_coef:
            if batch.ref_logp is None:
                raise ValueError(
                    f"method {self.name!r} has a KL penalty and needs TokenBatch.ref_logp, the log-probs under "
                    "the reference policy; set it, or kl_coef=0 for no penalty"
                )
            coefficient = self.kl_coef(signal, batch.mask) if callable(self.kl_coef) else self.kl_coef
            # The penalty acts on every valid token, also on those that `keep` takes out of the surrogate.
            everywhere = replace(batch.totals, kept=batch.totals.tokens)
            total = total + self.reduce(coefficient * per_token["kl"], batch.mask, everywhere)
        n = max(batch.totals.tokens, 1)
        on = batch.mask.to(ratio.dtype)
        metrics = {
            name: (lengths(x).sum().float() if x.dtype == torch.bool else (x.detach() * on).sum()) / n
            for name, x in per_token.items()
        }
        tokens = {
            "ratio": ratio.detach(),
            "advantage": advantage,
            "low": bounds.low,
            "high": bounds.high,
            "clipped": surrogate.clipped_low | surrogate.clipped_high,
        }
        if signal is not None:
            tokens["signal"] = signal
        return _Terms(total, metrics, tokens)

    def temperature(
        self, logits: Float[Tensor, "*shape V"], stats: EntropyStats | None, t_base: float = 1.0
    ) -> Float[Tensor, "*shape"]:
        """Sampling temperature of each position, from logits and the previous rollout's statistics.

        T_base where the method has no law or there are no statistics yet. The entropy is taken of
        softmax(logits / t_base), before any truncation of the vocabulary.
        """
        shape, device = logits.shape[:-1], logits.device
        if self.factor is None or stats is None:
            return torch.full(shape, t_base, device=device)
        return t_base * self.factor(entropy_from_logits(logits, t_base), stats)

    def _need(self, batch: TokenBatch, name: str) -> None:
        if getattr(batch, name) is None:
            raise ValueError(f"method {self.name!r} reads TokenBatch.{name}, and it is missing: {_FIELD[name]}")


_FIELD = {
    "old_entropy": "the policy's entropy at rollout, nats, taken in the same pass as old_logp",
    "entropy": "the current policy's entropy, nats, taken in the same pass as logp",
    "logp": "the log-prob of each token under the current policy",
}

_CURRENT = ("logp", "entropy")
_ENTROPIES = ("entropy", "old_entropy")


def _clean(batch: TokenBatch, names: Iterable[str] = TOKEN_FIELDS) -> TokenBatch:
    """These per-token tensors in float32 (float64 stays), without autograd, zero outside the mask; rewards too."""
    tensors = {name: value for name in names if (value := getattr(batch, name)) is not None}
    changes: dict[str, Any] = {**all_masked(tensors, batch.mask)}
    for name in ("reward", "verdict"):
        value = getattr(batch, name)
        if value is not None:
            changes[name] = value.to(working_dtype(value))
    return batch.replace(**changes)


class _WithGradient(torch.autograd.Function):
    """A value whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = logp.dtype
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), None, None
