"""Run records of a training run in TRL: hands its values to `hapo.engines.records`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from ...batch import EntropyStats, TokenBatch
from ...method import LossOutput, Method
from ...supervised import Supervised
from ..records import RunRecords, manifest, weights_hash
from .config import HAPOConfig
from .options import DECIDED_BY_METHOD
from .rows import RolloutRows, scored_tokens

NOT_TOLD = {"hub_token", "accelerator_config", "debug", "gradient_checkpointing", "method", "method_options"}
"""Secrets, what TRL fills in itself, deprecated twins of other options, and what is written apart."""


def open_records(
    args: TrainingArguments,
    method: Method | Supervised,
    recipe: dict[str, Any],
    model: PreTrainedModel,
    dataset: Any,
    checkpoint: str | None,
) -> RunRecords:
    """The run folder of `args.output_dir`: a new one, or with a checkpoint that of the run that goes on.

    `recipe` is what the run was told beside `args`, `model` has no wrappers.

    Raises:
        FileExistsError: the folder holds another run.
        OSError: it cannot be written to, or the disk is full.
    """
    folder, rank = Path(args.output_dir), args.process_index
    if checkpoint is not None:
        return RunRecords.resume(folder, int(checkpoint.rsplit("-", 1)[1]), rank)
    return RunRecords.create(
        folder,
        config={**recipe, **_told(args), "method": method.name, "method_options": options_told(method)},
        manifest=manifest(
            seed=args.seed,
            model=str(model.config._name_or_path),
            weights_sha256=weights_hash(model),
            data_fingerprint=getattr(dataset, "_fingerprint", None),
            processes=args.world_size,
            **({"kind": "supervised"} if isinstance(method, Supervised) else {}),
        ),
        rank=rank,
        need=_checkpoint_bytes(model) if args.save_strategy != "no" else 0,
    )


class Recorder:
    """Feeds a run folder with the tokens of some rollout batches.

    Args:
        records: the open folder.
        args: the schedule; how often, and how many rows.
        method: whose temperature rule drew the tokens.
        decode: rows of token ids -> strings.
    """

    def __init__(
        self,
        records: RunRecords,
        args: HAPOConfig,
        method: Method,
        decode: Callable[[Sequence[Any]], list[str]],
    ) -> None:
        self.records = records
        self.args = args
        self.temperature_rule = method.temperature_rule
        self.decode = decode

    def takes_tokens(self, step: int) -> bool:
        """Whether the rollout batch of an optimiser step, from 1, is one to record."""
        every, rollout = self.args.record_tokens_every, (step - 1) // self.args.updates_per_rollout + 1
        return bool(every) and (rollout == 1 or rollout % every == 0)

    def add_tokens(
        self,
        step: int,
        inputs: dict[str, Any],
        batch: TokenBatch,
        out: LossOutput,
        sampled_with: EntropyStats | None,
        beside: dict[str, Tensor],
    ) -> None:
        """Tokens of one pass.

        Args:
            step: the optimiser step at work, from 1.
            inputs: a dict of TRL's, prepared.
            batch: its rows, with the current policy's scores.
            out: the loss of `batch`.
            sampled_with: the statistics that the rows were drawn with; None: at T_base.
            beside: further columns (B,T): "gate" of a model that has gates, "unmasked" and "confidence" of a
                masked-diffusion model.
        """
        rows = self._recorded(batch)
        if not rows.any():
            return
        of_rollout = RolloutRows.of(inputs)
        batch = batch.rows(rows)
        ids = inputs["completion_ids"][rows]
        mask = scored_tokens(inputs)[rows]
        prompts = zip(inputs["prompt_ids"][rows], inputs["prompt_mask"][rows].bool(), strict=True)
        assert batch.old_entropy is not None
        temperature = torch.full_like(batch.old_entropy, self.args.temperature)
        if self.temperature_rule is not None and sampled_with is not None:
            temperature = temperature * self.temperature_rule(batch.old_entropy, sampled_with)
        self.records.add_tokens(
            step,
            self._rollout(step),
            batch,
            {name: x[rows] for name, x in {**out.tokens, **beside}.items()},
            mask=mask,
            response=of_rollout.response[rows],
            responses=int(of_rollout.responses),
            ids=ids,
            texts=[self.decode([[t] for t in row]) for row in ids.tolist()],
            prompts=self.decode([row[shown] for row, shown in prompts]),
            temperature=temperature,
            said=self._said(ids, mask, inputs["completion_mask"][rows]) if "tool_mask" in inputs else None,
        )

    def add_rewards(self, step: int, inputs: dict[str, Any]) -> None:
        """Rewards of the responses of a micro-batch that have no token: no pass has them, and their groups do."""
        of_rollout = RolloutRows.of(inputs)
        rows = self._recorded(of_rollout.batch)
        self.records.add_rewards(
            self._rollout(step),
            of_rollout.batch.rows(rows),
            scored_tokens(inputs)[rows],
            of_rollout.response[rows],
            int(of_rollout.responses),
        )

    def _said(self, ids: Tensor, own: Tensor, whole: Tensor) -> list[list[str | None]]:
        """The text between each of the model's own tokens (B,T) and the next one, or the end of the response."""
        said: list[list[str | None]] = [[None] * ids.shape[1] for _ in ids]
        for i, row in enumerate(own):
            places = row.nonzero().squeeze(1).tolist()
            for here, after in zip(places, [*places[1:], int(whole[i].sum())], strict=True):
                if after > here + 1:
                    (said[i][here],) = self.decode([ids[i, here + 1 : after]])
        return said

    def _recorded(self, batch: TokenBatch) -> Tensor:
        """The rows (B,) of the groups that are recorded, the first ones."""
        return batch.group < max(1, self.args.record_tokens_rows // self.args.num_generations)

    def _rollout(self, step: int) -> int:
        """First optimiser step of the rollout batch of a step."""
        return step - (step - 1) % self.args.updates_per_rollout

    def write_tokens(self, step: int) -> None:
        """At the end of a step."""
        self.records.write_tokens(step)


def options_told(method: Method | Supervised) -> dict[str, Any]:
    """The options of a method, without what TRL's `beta` says."""
    return {k: v for k, v in method.options.items() if k not in ("method", "kl_coef")}


def _told(args: TrainingArguments) -> dict[str, Any]:
    """The options that differ from their defaults, as plain values: a recipe that the command line reads back."""
    values = args.to_dict()
    told = {}
    for f in fields(args):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        # transformers writes <EOS_TOKEN> and the like in the place of every token, secret or not.
        value = getattr(args, f.name, None) if f.name.endswith("_token") else values.get(f.name)
        if (
            f.init
            and f.name not in NOT_TOLD
            and f.name not in DECIDED_BY_METHOD  # what is asked for of these is what the method does
            and value != default
            and isinstance(value, (str, int, float, bool, list, dict))
        ):
            told[f.name] = value
    if "steps_per_generation" in told:
        told.pop("generation_batch_size", None)  # TRL fills in the one from the other
    return told


def _checkpoint_bytes(model: torch.nn.Module) -> int:
    """Weights, and two moments for each trained one."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights + 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
