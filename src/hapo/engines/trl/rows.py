"""Rollout batch and optimiser step through the stages of a `Method`, on all ranks; what travels with the rows.

TRL shuffles and splits dicts of tensors, so rows travel as such: `RolloutRows` alone knows under which keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor
from trl.trainer.utils import split_tensor_dict

from ...batch import EntropyStats, StepTotals, TokenBatch
from ...method import Method
from ...parts.credit import last_token
from .gather import concat_rows, gather_rows

TRLS = {
    "old_logp": "old_per_token_logps",
    "old_entropy": "old_entropies",
    "ref_logp": "ref_per_token_logps",
    "sampler_logp": "sampling_per_token_logps",
    "verdict": "verdict",
    "rewards": "rewards_per_func",
    "token_reward": "token_reward",
    "turn": "turn",
}
"""Fields that a rollout has before it is prepared, and their keys in it."""

STEP = ("totals", "stats")
"""Fields that are made at the beginning of each optimiser step, whatever the method."""

MADE = ("mask", "advantage", "signal", "weight", "keep")
"""What the stages of a method make per token, before the loss."""

OURS = (*MADE, "reward", "group", *STEP)


@dataclass(frozen=True)
class RolloutRows:
    """Rows of a prepared rollout batch, on this rank."""

    batch: TokenBatch
    """Without the current policy's scores; `totals` and `stats` come with `step_rows`. Tokens of dropped
    groups are masked, but have their log-probs and entropies, which records show."""
    response: Int[Tensor, " B"]
    """Place of each row in the rollout batch of all ranks."""
    responses: Int[Tensor, ""]
    """Rows of that whole batch that could be scored. Where some have no tokens, and so no record, records are not
    whole: readers compare."""

    def put(self, inputs: dict[str, Any]) -> None:
        """Write every field into a dict of TRL's; a field without a value leaves it."""
        values = {TRLS.get(name, f"hapo_{name}"): getattr(self.batch, name) for name in (*TRLS, *OURS)}
        values |= {"hapo_response": self.response, "hapo_responses": self.responses}
        values["advantages"] = self.batch.advantage  # under TRL's name, in place of TRL's own
        for key, value in values.items():
            if value is None:
                inputs.pop(key, None)
            else:
                inputs[key] = value

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> RolloutRows:
        """What `put` wrote, or the rows that TRL took of it."""
        fields: dict[str, Any] = {name: inputs.get(TRLS.get(name, f"hapo_{name}")) for name in (*TRLS, *OURS)}
        return cls(TokenBatch(**fields), inputs["hapo_response"], inputs["hapo_responses"])


def whole_groups(parts: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """A rollout batch that TRL shuffled and split, split anew: all rows of a group in one optimiser step.

    Groups are dealt to the steps in the order in which the shuffle met them, those with a token first, so that
    steps have as many of these, give or take one.

    Args:
        parts: the micro-batches, whole groups over each optimiser step.
        steps: optimiser steps that they are.

    Raises:
        TypeError: something in them is neither a tensor nor a list with a row for each response.
    """
    group = torch.cat([part["hapo_group"] for part in parts])
    learns = torch.cat([part["hapo_mask"].any(1) for part in parts])
    _, number = group.unique(return_inverse=True)
    rows = torch.arange(len(group), device=group.device)
    groups = int(number.amax()) + 1
    met = rows.new_full((groups,), len(rows)).scatter_reduce(0, number, rows, "amin")
    learns_as_group = learns.new_zeros(groups).index_put((number,), learns, accumulate=True)
    order = torch.argsort(met + len(rows) * ~learns_as_group)
    dealt = order.view(-1, steps).T.flatten()
    place = torch.empty_like(dealt).scatter(0, dealt, rows[:groups])
    index = place[number].argsort(stable=True)
    whole = {name: _moved(name, [part[name] for part in parts], index) for name in parts[0]}
    return split_tensor_dict(whole, len(parts))


def _moved(name: str, values: list[Any], index: Int[Tensor, " B"]) -> Any:
    """A value of all parts, its rows in this order; what is of the whole rollout batch as it is."""
    first = values[0]
    if first is None or (isinstance(first, Tensor) and not first.ndim):
        return first
    if isinstance(first, Tensor):
        return torch.cat(values)[index]
    if isinstance(first, list) and sum(map(len, values)) == len(index):
        every = [x for value in values for x in value]
        return [every[i] for i in index.tolist()]
    raise TypeError(
        f"whole_groups=True cannot move {name!r}, a {type(first).__name__}, with the rows: leave it out"
    )


def without_step(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs without what is made anew at the beginning of an optimiser step: what a checkpoint holds."""
    return {key: value for key, value in inputs.items() if key not in {f"hapo_{name}" for name in STEP}}


def valid_tokens(rollout: dict[str, Any]) -> Bool[Tensor, "B T"]:
    """Response tokens that the policy wrote."""
    mask = rollout["completion_mask"]
    return (mask if "tool_mask" not in rollout else mask * rollout["tool_mask"]).bool()


def scored_tokens(rollout: dict[str, Any]) -> Bool[Tensor, "B T"]:
    """Valid response tokens of what a reward function could score; other responses are in no count."""
    return valid_tokens(rollout) & ~rollout["verdict"].isnan().unsqueeze(1)


class Prepared(NamedTuple):
    """A rollout batch as `Method.prepare` leaves it."""

    rows: RolloutRows
    """Those of this rank."""
    batch: TokenBatch
    """Of all ranks."""
    scored: Bool[Tensor, "B T"]
    """Of all ranks: valid tokens, those of dropped groups included."""


def prepare_rows(
    method: Method,
    rollout: dict[str, Any],
    accelerator: Accelerator,
    *,
    group_size: int,
    punish: Callable[[Int[Tensor, " B"]], Float[Tensor, " B"]] | None = None,
    one_step: bool = False,
) -> Prepared:
    """`Method.prepare` over the rollout batch of all ranks.

    Args:
        method: whose stages run.
        rollout: this rank's rows, whole groups of `group_size` over all ranks together.
        accelerator: gathers the rows.
        group_size: responses of a prompt.
        punish: tokens of each response -> what its reward is changed by, and that of its last token; its verdict
            stays.
        one_step: take the whole batch as one optimiser step of the policy that drew it, as an evaluation does.
    """
    mask = scored_tokens(rollout)
    before = {name: rollout[key] for name, key in TRLS.items() if key in rollout}
    local = {"mask": mask, **before}
    if "sampler_logp" in before:
        # Where vLLM has no log-prob for a token, it counts as drawn from the old policy.
        sampler = before["sampler_logp"]
        local["sampler_logp"] = torch.where(sampler.isnan(), before["old_logp"], sampler)
    everyone = gather_rows(accelerator, local)
    reward, scored = everyone["verdict"], everyone["mask"]
    if punish is not None:
        added = punish(scored.sum(1))
        reward = reward + added
        if "token_reward" in everyone:
            on_last = torch.where(last_token(scored), added.unsqueeze(1), 0.0)
            everyone["token_reward"] = everyone["token_reward"] + on_last
    group = torch.arange(len(reward), device=reward.device) // group_size
    batch = method.prepare(TokenBatch(reward=reward, group=group, **everyone))  # type: ignore[arg-type]
    first = accelerator.process_index * len(mask)
    rows, width = slice(first, first + len(mask)), mask.shape[1]
    mine: dict[str, Any] = {**before, "reward": reward[rows], "group": group[rows]}
    if "token_reward" in before:
        mine["token_reward"] = everyone["token_reward"][rows, :width]
    made = batch
    if one_step:
        made = method.step(batch.replace(logp=batch.old_logp, entropy=batch.old_entropy))
        mine |= {"totals": made.totals, "stats": made.stats}
    mine |= {name: x[rows, :width] for name in MADE if (x := getattr(made, name)) is not None}
    response = torch.arange(len(reward), device=reward.device)[rows]
    return Prepared(RolloutRows(TokenBatch(**mine), response, batch.scored.sum()), batch, scored)


def step_rows(
    method: Method,
    micro_batches: Sequence[RolloutRows],
    accelerator: Accelerator,
    stats: EntropyStats | None,
    score: Callable[[int], tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]],
) -> list[RolloutRows]:
    """`Method.step` over the optimiser step of all ranks: exact totals, and what its stages make of the policy.

    Args:
        method: whose stage runs.
        micro_batches: those of the step, on this rank.
        accelerator: adds up and gathers.
        stats: entropy statistics that go along.
        score: number of a micro-batch -> log-probs and entropies of the current policy, without a gradient; called
            only where the method reads them.
    """
    if not method.step_reads_policy:
        masks = [(b.mask, b.mask if b.keep is None else b.mask & b.keep) for b in (r.batch for r in micro_batches)]
        local = torch.stack([torch.stack([m.any(1).sum(), m.sum(), kept.sum()]) for m, kept in masks]).sum(0)
        totals = StepTotals(*accelerator.reduce(local, "sum").tolist())
        return [_changed(rows, totals=totals, stats=stats) for rows in micro_batches]
    scores = [score(i) for i in range(len(micro_batches))]
    plain = [
        rows.batch.replace(totals=None, logp=logp, entropy=entropy)
        for rows, (logp, entropy) in zip(micro_batches, scores, strict=True)
    ]
    local_rows = concat_rows([_tensors(batch) for batch in plain])
    everyone: dict[str, Any] = gather_rows(accelerator, local_rows)
    step = method.step(TokenBatch(**everyone, stats=stats))
    first = accelerator.process_index * len(local_rows["mask"])
    out = []
    for rows in micro_batches:
        size, width = rows.batch.mask.shape
        of_step = {name: x for name in ("signal", "keep") if (x := getattr(step, name)) is not None}
        made = {name: x[first : first + size, :width] for name, x in of_step.items()}
        out.append(_changed(rows, **made, totals=step.totals, stats=stats))
        first += size
    return out


def _changed(rows: RolloutRows, **changes: Any) -> RolloutRows:
    return replace(rows, batch=rows.batch.replace(**changes))


def _tensors(batch: TokenBatch) -> dict[str, Tensor]:
    return {f.name: x for f in fields(batch) if isinstance(x := getattr(batch, f.name), Tensor)}
