"""Method: one choice a stage, and the calls that a trainer makes: prepare(), step(), loss()."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .batch import TOKEN_FIELDS, EntropyStats, LossOutput, StepTotals, TokenBatch, masked
from .parts.bounds import Bounds, constant_bounds, no_bounds
from .parts.elbo import Likelihood
from .parts.entropy import entropy_from_logits
from .parts.penalty import k3
from .parts.ratio import token_ratio, truncated_correction
from .parts.reduce import token_mean
from .parts.select import mixed_groups
from .parts.surrogate import Surrogate, clipped_surrogate
from .stage import Record, Stage, When, describe, part_of


@dataclass(frozen=True, kw_only=True, repr=False)
class Method:
    """A policy-optimisation method as one choice a stage: a function of the record (`hapo.stage.Record`).

    A stage reads what it needs of the batch, and what the stages before it have made. What a stage returns is a
    constant for autograd, but for ratio, surrogate and penalty. Whatever a stage returns outside the mask is
    dropped, value and gradient. Prepare stages see a whole rollout batch, of all ranks; step stages a whole
    optimiser step; loss stages whole rows of a step.
    """

    name: str
    advantage: Callable[[Record], Float[Tensor, "B T"]]
    """Prepare. The advantage of every valid token."""
    filter_groups: bool = False
    """Prepare. Drop the rows of groups whose verdicts are all equal (DAPO's dynamic sampling)."""
    stats: Callable[[Record], EntropyStats | None] | None = None
    """Prepare, before the signal. Entropy statistics of the rollout batch, for the signal and the next rollout's
    temperature."""
    signal: Callable[[Record], Float[Tensor, "B T"]] | None = None
    """As `signal_at` says. A number per token that later stages read."""
    signal_at: When = "prepare"
    """At "prepare" it comes before the advantage; at "step" and "loss" it may read it, and the current policy."""
    credit: Callable[[Record], Float[Tensor, "B T"]] | None = None
    """Prepare, before the advantage. Of `token_reward`, what the advantage compares in the place of `reward`: the
    record's `returns`, a number for each row and column."""
    likelihood: Likelihood | None = None
    """Scoring. How the log-probs are made of views of a response with some of it hidden, by a masked-diffusion
    model; None: they are the autoregressive ones."""
    sampler_cap: float | None = 2.0
    """Prepare. Weight min(exp(old - sampler), cap) on tokens whose `sampler_logp` is known; None: no weight."""
    select: Callable[[Record], Bool[Tensor, "B T"]] | None = None
    """As `select_at` says. Tokens that enter the surrogate's sum; the batch's `keep`."""
    select_at: When = "prepare"
    """At "step" it may read the current policy. At "loss" too, and `totals.kept` counts all valid tokens, since no
    micro-batch knows what the others keep."""
    temperature_rule: Callable[[Tensor, EntropyStats], Tensor] | None = None
    """Sampling. (entropy, statistics) -> factor on T_base; None: T = T_base."""
    ratio: Callable[[Record], Float[Tensor, "B T"]] = Stage(token_ratio, "logp", "old_logp")
    """Loss. Importance ratio, differentiable in logp."""
    bounds: Callable[[Record], Bounds] = Stage(constant_bounds, "ratio", low=0.2, high=0.2)
    """Loss. Clip bounds."""
    shaping: Callable[[Record], Float[Tensor, "B T"]] | None = None
    """Loss. The advantage as the surrogate uses it."""
    trusted: Callable[[Record], Bool[Tensor, "B T"]] | None = None
    """Loss. Where it is False the surrogate's loss is 0, and the tokens stay in every count."""
    surrogate: Callable[[Record], Surrogate] = Stage(clipped_surrogate, "ratio", "advantage", "bounds")
    """Loss. Loss per token; the sampler's weight multiplies it."""
    penalty: Callable[[Record], Float[Tensor, "B T"]] | None = None
    """Loss. Added to the surrogate on every valid token, kept or not; with its coefficient (`parts.penalty`)."""
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

    @property
    def stages(self) -> dict[str, str]:
        """The choice of each stage in words, in the order in which they act, without those that do nothing."""
        chosen: dict[str, Any] = {
            "temperature": self.temperature_rule,
            "likelihood": self.likelihood,
            "filter": mixed_groups if self.filter_groups else None,
            "signal": self.signal,
            "credit": self.credit,
            "advantage": self.advantage,
            "select": self.select,
            "ratio": self.ratio,
            "bounds": None if part_of(self.bounds) is no_bounds else self.bounds,
            "shaping": self.shaping,
            "trusted": self.trusted,
            "surrogate": self.surrogate,
            "penalty": self.penalty,
            "reduce": self.reduce,
        }
        late = {"signal": self.signal_at, "select": self.select_at}
        return {
            name: describe(stage) + ("" if late.get(name, "prepare") == "prepare" else f", at {late[name]}")
            for name, stage in chosen.items()
            if stage is not None
        }

    @property
    def step_reads_policy(self) -> bool:
        """step() needs `logp` and `entropy` of the current policy, for all rows of the optimiser step."""
        return "step" in self._made_at.values()

    @property
    def loss_reads_entropy(self) -> bool:
        """loss() needs `entropy` of the current policy: made there, or read by a `Stage`."""
        of_loss = (self.ratio, self.bounds, self.shaping, self.trusted, self.surrogate, self.penalty)
        reads = {name for stage in of_loss if isinstance(stage, Stage) for name in stage.reads}
        return "loss" in self._made_at.values() or "entropy" in reads

    @property
    def _made_at(self) -> dict[str, When]:
        """Field that signal or select makes -> when."""
        stages = {"signal": (self.signal, self.signal_at), "keep": (self.select, self.select_at)}
        return {name: at for name, (stage, at) in stages.items() if stage is not None}

    def prepare(self, batch: TokenBatch) -> TokenBatch:
        """Advantage, signal and weight of a rollout batch, frozen; statistics. Then step(), as one step.

        A row whose reward or verdict is NaN could not be scored: it is in no statistic, its tokens are masked.
        Where only `token_reward` is given, `reward` is its sum.

        Call it once on the whole rollout batch, all ranks together: group means, statistics and advantages are
        taken here and nowhere else. Where the rollout batch is used for several optimiser steps, call `step` on
        the rows of each. With `step_reads_policy` no step is made here: `step` must be called in any case.

        Raises:
            ValueError: a field that this method reads is missing.
        """
        batch = batch.replace(**dict.fromkeys(("advantage", "signal", "weight", "keep", "stats", "totals")))
        if batch.reward is None and batch.token_reward is not None:
            batch = batch.replace(reward=batch.outcome)
        rollout = Record(self.name, batch)
        rollout.check("reward", "group", "old_logp")  # what every policy method reads
        reward, group = rollout.reward, rollout.group
        used = scored = batch.scored
        if self.filter_groups:
            used = mixed_groups(rollout.verdict, group, scored)
        rewards = batch.rewards
        batch = batch.replace(
            mask=batch.mask & used.unsqueeze(1),
            reward=reward.masked_fill(~scored, torch.nan),
            rewards=None if rewards is None else rewards.masked_fill(~scored.unsqueeze(1), torch.nan),
        )
        record = Record(self.name, batch)
        made: dict[str, Any] = {}
        with torch.no_grad():
            if self.stats is not None:
                made["stats"] = self.stats(record)
                record.stats = made["stats"]
            if self.signal is not None and self.signal_at == "prepare":
                record.signal = made["signal"] = masked(self.signal(record), batch.mask)
            if self.credit is not None:
                record.returns = self.credit(record)
            record.advantage = made["advantage"] = masked(self.advantage(record), batch.mask)
            if self.sampler_cap is not None and batch.sampler_logp is not None:
                weight = truncated_correction(record.old_logp, record.sampler_logp, self.sampler_cap)
                record.weight = made["weight"] = masked(weight, batch.mask)
            if self.select is not None and self.select_at == "prepare":
                made["keep"] = self.select(record) & batch.mask
        given = [name for name in TOKEN_FIELDS if name not in ("logp", "entropy") and name in record]
        clean = {name: getattr(record, name) for name in (*given, "reward")}
        batch = batch.replace(**{**clean, **made})
        return batch if self.step_reads_policy else self.step(batch)

    def step(self, batch: TokenBatch) -> TokenBatch:
        """These rows of a prepared batch as one optimiser step: what is made at "step", and its totals, frozen.

        Call it on all rows of the step, all ranks together. With `step_reads_policy`, `logp` and `entropy` must be
        the current policy's.

        Raises:
            ValueError: the batch was not prepared, or a field that this method reads is missing.
        """
        if batch.advantage is None:
            raise ValueError("step() got a batch without advantages: call method.prepare(batch) first")
        record = Record(self.name, batch)
        made: dict[str, Any] = {}
        with torch.no_grad():
            if self.signal is not None and self.signal_at == "step":
                record.signal = made["signal"] = masked(self.signal(record), batch.mask)
            if self.select is not None and self.select_at == "step":
                made["keep"] = self.select(record) & batch.mask
        batch = batch.replace(**made)
        return batch.replace(totals=batch.count())

    def loss(self, batch: TokenBatch) -> LossOutput:
        """Loss of an optimiser step, or of any slice of it (`batch.rows(...)`); see `LossOutput`.

        A function of `batch.logp` that torch can differentiate as often as one likes; all else is a constant. An
        empty batch has loss 0 and gradient 0. It works on all rows at once: slice a large batch whose rows are
        much shorter than its width, and cut off the columns that a slice does not use.

        Raises:
            ValueError: the batch was not prepared, or a field that this method reads is missing.
        """
        self._check_prepared(batch)
        assert batch.totals is not None
        record, mask, totals = Record(self.name, batch), batch.mask, batch.totals
        keep = batch.keep
        with torch.no_grad():
            if self.signal is not None and self.signal_at == "loss":
                record.signal = masked(self.signal(record).detach(), mask)
            if self.select is not None and self.select_at == "loss":
                keep = record.keep = self.select(record).detach()
        record.ratio = torch.where(mask, self.ratio(record), 1.0)
        prepared = record.advantage
        with torch.no_grad():
            record.bounds = bounds = Bounds(*(bound.detach() for bound in self.bounds(record)))
            if self.shaping is not None:
                record.advantage = masked(self.shaping(record).detach(), mask)
            trusted = None if self.trusted is None else self.trusted(record).detach()
        surrogate = self.surrogate(record)
        loss = surrogate.loss if batch.weight is None else surrogate.loss * record.weight
        kept = mask if keep is None else mask & keep
        total = self.reduce(masked(loss, kept if trusted is None else kept & trusted), kept, totals)
        if self.penalty is not None:
            # On every valid token, also on those that `select` takes out of the surrogate.
            everywhere = replace(totals, kept=totals.tokens)
            total = total + self.reduce(masked(self.penalty(record), mask), mask, everywhere)
        tokens = {
            "ratio": record.ratio.detach(),
            "advantage": record.advantage,
            "low": bounds.low,
            "high": bounds.high,
            "clipped": surrogate.clipped_low | surrogate.clipped_high,
            "kept": kept if trusted is None else kept & trusted,
        }
        if "signal" in record:
            tokens["signal"] = record.signal
        with torch.no_grad():
            metrics = {
                "ratio": tokens["ratio"],
                "clip/low": surrogate.clipped_low & kept,
                "clip/high": surrogate.clipped_high & kept,
                "kl_old": k3(record.old_logp, record.logp.detach()),
            }
            if batch.weight is not None:
                metrics["sampler_weight"] = record.weight
            if keep is not None:
                metrics["kept"] = kept
            if trusted is not None:
                metrics["trusted"] = trusted
            if self.shaping is not None:
                metrics["reshaped"] = record.advantage != prepared
            if batch.ref_logp is not None:
                metrics["kl"] = k3(record.logp.detach(), record.ref_logp)
            n = max(totals.tokens, 1)
            metrics = {name: torch.where(mask, x, 0).sum() / n for name, x in metrics.items()}
        return LossOutput(total, {"loss": total.detach(), **metrics}, tokens)

    def _check_prepared(self, batch: TokenBatch) -> None:
        if batch.advantage is None:
            raise ValueError("loss() got a batch without advantages: call method.prepare(batch) first")
        if batch.logp is None:
            raise ValueError("loss() needs TokenBatch.logp, the log-probs under the current policy")
        missing = {at for name, at in self._made_at.items() if getattr(batch, name) is None}
        if "prepare" in missing:
            raise ValueError(f"method {self.name!r} did not prepare this batch: call method.prepare(batch) first")
        if batch.totals is None or "step" in missing:
            raise ValueError(
                f"method {self.name!r} did not make this step: call method.step(batch) on all rows of the "
                "optimiser step, after prepare() and before loss()"
            )

    def temperature(
        self, logits: Float[Tensor, "*shape V"], stats: EntropyStats | None, t_base: float = 1.0
    ) -> Float[Tensor, "*shape"]:
        """Sampling temperature of each position, from logits and the previous rollout's statistics.

        T_base where the method has no rule or there are no statistics yet. The entropy is taken of
        softmax(logits / t_base), before any truncation of the vocabulary.
        """
        shape, device = logits.shape[:-1], logits.device
        if self.temperature_rule is None or stats is None:
            return torch.full(shape, t_base, device=device)
        return t_base * self.temperature_rule(entropy_from_logits(logits, t_base), stats)
