"""Rollout batches and optimiser steps across ranks: gathering, padding, dynamic sampling. Plumbing only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import IterableDataset
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import RepeatSampler

import hapo

from ...parts.select import mixed_groups

TensorDict = dict[str, Tensor]
NEWEST = 0.2
"""Weight of the last rollout batch in the share of mixed groups: the policy moves slowly, single batches vary."""

LEFT_PADDED = frozenset({"prompt_ids", "prompt_mask"})


class EpochSampler(RepeatSampler):
    """TRL's sampler, its order a function of seed and epoch alone, so that a resumed run sees the same order."""

    def __init__(self, *args: Any, trainer_state: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._state = trainer_state

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + int(self._state().epoch or 0))
        return super().__iter__()


class FreshPrompts:
    """An endless, seeded order of the training prompts for dynamic sampling; its state is one counter."""

    def __init__(self, dataset: Any, seed: int, position: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed
        self.position = position
        self._order: tuple[int, list[int]] = (-1, [])

    def take(self, n: int, used: set[str]) -> list[dict[str, Any]]:
        """The next n prompts that are not in `used` (and adds them); fewer once a whole pass gave nothing."""
        taken: list[dict[str, Any]] = []
        for _ in range(2 * len(self.dataset)):
            if len(taken) == n:
                break
            row = self.dataset[self._index()]
            if prompt_key(row) not in used:
                used.add(prompt_key(row))
                taken.append(row)
        return taken

    def _index(self) -> int:
        epoch, offset = divmod(self.position, len(self.dataset))
        self.position += 1
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._order = epoch, torch.randperm(len(self.dataset), generator=generator).tolist()
        return self._order[1][offset]


def prompt_key(row: dict[str, Any]) -> str:
    """Identity of a problem: its prompt and all its other columns."""
    return json.dumps(row, sort_keys=True, default=str)


def gather_rows(accelerator: Accelerator, tensors: TensorDict) -> TensorDict:
    """The rows of all ranks, in rank order; (B,T) tensors zero-padded to the widest rank, prompts on the left."""
    if accelerator.num_processes == 1:
        return dict(tensors)
    out = {}
    for name, x in tensors.items():
        as_bool = x.dtype == torch.bool
        x = x.to(torch.uint8) if as_bool else x
        if x.ndim > 1:
            x = accelerator.pad_across_processes(x, dim=1, pad_first=name in LEFT_PADDED)
        x = accelerator.gather(x)
        out[name] = x.bool() if as_bool else x
    return out


def concat_rows(parts: list[TensorDict]) -> TensorDict:
    """Row-wise concatenation; (B,T) tensors zero-padded to the widest part, prompts on the left."""
    out = {}
    for name in parts[0]:
        xs = [part[name] for part in parts]
        if xs[0].ndim > 1:
            width = max(x.shape[1] for x in xs)
            xs = [_pad(x, width - x.shape[1], name in LEFT_PADDED) for x in xs]
        out[name] = torch.cat(xs)
    return out


def _pad(x: Tensor, n: int, left: bool) -> Tensor:
    return torch.nn.functional.pad(x, (n, 0) if left else (0, n))


def prompts_to_draw(groups: int, share: float, unit: int) -> int:
    """Prompts that give so many mixed groups, most likely, where `share` of all groups are mixed; in whole units.

    Of n prompts n share give a mixed group, with a standard deviation of sqrt(n share (1 - share)), one of which
    is added: a round more takes as long as its longest response.
    """
    wanted = (groups + math.sqrt(groups * (1 - share))) / share
    return math.ceil(wanted / unit) * unit


class DynamicSampling:
    """Fresh prompts in place of groups with equal verdicts, up to a number of rounds (DAPO, eq. 11).

    With `draw_ahead` the first round holds further prompts, as many as the last rollout batches let expect that
    will be needed, at most as many again.

    Raises:
        ValueError: the training data is a stream, or a rollout holds images.
    """

    def __init__(self, trainer: Any) -> None:
        if isinstance(trainer.train_dataset, IterableDataset) or not hasattr(trainer.train_dataset, "__len__"):
            raise ValueError(
                "dynamic sampling (max_num_gen_batches > 1) draws further prompts by index, and an iterable "
                "data set has none: use a map-style data set, or max_num_gen_batches=1"
            )
        self.trainer = trainer
        self.prompts = FreshPrompts(trainer.train_dataset, trainer.args.seed + 1)
        self.share: float | None = None
        """Mixed groups among all that the last rollout batches drew, an exponential average."""

    def rollout(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout, with as many mixed groups as these prompts are, or as many as the rounds gave.

        `inputs` are this rank's rows. Kept groups come first, in the order drawn; what is missing is filled with
        groups that prepare() drops.
        """
        trainer, size = self.trainer, self.trainer.num_generations
        world = trainer.accelerator.num_processes
        used = set(gather_object([prompt_key(row) for row in inputs]))
        most = len(inputs) * world // size
        further = 0
        if trainer.args.draw_ahead and self.share is not None and len(inputs) % size == 0:  # no group on two ranks
            further = min(prompts_to_draw(most, self.share, world) - most, most)
        rollout = trainer._rollout(inputs + self._rows(further, world, used))
        if "num_images" in rollout:
            raise ValueError("dynamic sampling moves rows between ranks, images cannot: set max_num_gen_batches=1")
        pool = [self._gather(rollout)]
        mixed = self._mixed(pool[0])
        unit = world // math.gcd(world, size)  # every rank gets equally many rows
        while (have := int(mixed.sum())) < most and len(pool) < trainer.args.max_num_gen_batches:
            share = max(have, 1) / len(mixed)
            rows = self._rows(min(prompts_to_draw(most - have, share, unit), most), unit, used)
            if not rows:
                break
            pool.append(self._gather(trainer._rollout(rows)))
            mixed = torch.cat([mixed, self._mixed(pool[-1])])
        share = max(have, 1) / len(mixed)
        self.share = share if self.share is None else self.share + NEWEST * (share - self.share)
        everything = concat_rows(pool)
        order = torch.argsort((~mixed).int(), stable=True)[:most]
        index = (order.unsqueeze(1) * size + torch.arange(size, device=order.device)).flatten()
        index = index[trainer.accelerator.process_index * len(inputs) :][: len(inputs)]
        metrics = trainer._metrics["train"]
        metrics["dynamic_sampling/rounds"].append(len(pool))
        metrics["dynamic_sampling/drawn"].append(len(mixed) / most)
        metrics["dynamic_sampling/kept"].append(min(have, most) / most)
        return {**rollout, **{name: x[index] for name, x in everything.items()}}

    def _rows(self, prompts: int, unit: int, used: set[str]) -> list[dict[str, Any]]:
        """This rank's rows of so many fresh prompts, or of the whole units of them that are left."""
        taken = self.prompts.take(prompts, used)
        taken = taken[: len(taken) // unit * unit]
        rows = [dict(row) for row in taken for _ in range(self.trainer.num_generations)]
        share = len(rows) // self.trainer.accelerator.num_processes
        return rows[self.trainer.accelerator.process_index * share :][:share]

    def _gather(self, rollout: dict[str, Any]) -> TensorDict:
        rows = len(rollout["verdict"])
        tensors = {k: v for k, v in rollout.items() if isinstance(v, Tensor) and v.ndim and len(v) == rows}
        return gather_rows(self.trainer.accelerator, tensors)

    def _mixed(self, tensors: TensorDict) -> Tensor:
        """Groups to learn from: their scored verdicts differ, and some response has a token left."""
        verdict = tensors["verdict"]
        group = torch.arange(len(verdict), device=verdict.device) // self.trainer.num_generations
        mixed = mixed_groups(verdict, group, ~verdict.isnan()) & tensors["completion_mask"].any(1)
        return mixed.view(-1, self.trainer.num_generations).any(1)


def begin_step(trainer: Any, micro_batches: list[dict[str, Any]]) -> None:
    """Method.step over the optimiser step of all ranks: exact totals, and the tokens that it keeps."""
    if not trainer.method.step_reads_policy:
        masks = [(m := inputs["hapo_mask"], m & inputs.get("hapo_keep", m)) for inputs in micro_batches]
        local = torch.stack([torch.stack([m.any(1).sum(), m.sum(), kept.sum()]) for m, kept in masks]).sum(0)
        totals = hapo.StepTotals(*trainer.accelerator.reduce(local, "sum").tolist())
        for inputs in micro_batches:
            inputs["hapo_totals"] = totals
        return
    local_rows = concat_rows([_step_fields(trainer, inputs) for inputs in micro_batches])
    everyone: dict[str, Any] = gather_rows(trainer.accelerator, local_rows)
    batch = trainer.method.step(hapo.TokenBatch(**everyone, stats=trainer.temperature_stats))
    first = trainer.accelerator.process_index * len(local_rows["mask"])
    for inputs in micro_batches:
        rows, width = inputs["hapo_mask"].shape
        for name in ("signal", "keep"):
            x = getattr(batch, name)
            if x is not None:
                inputs[f"hapo_{name}"] = x[first : first + rows, :width]
        inputs["hapo_totals"] = batch.totals
        first += rows


def _step_fields(trainer: Any, inputs: dict[str, Any]) -> TensorDict:
    """The tensors of a micro-batch, with the current policy's scores."""
    with (
        torch.no_grad(),
        disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
    ):
        logp, entropy, _ = trainer._score(trainer.model, {**inputs, "hapo_needed": inputs["hapo_mask"]})
    batch = trainer._batch({**inputs, "hapo_totals": None}, logp, entropy)
    return {f.name: x for f in fields(batch) if isinstance(x := getattr(batch, f.name), Tensor)}
