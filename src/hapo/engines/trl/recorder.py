"""Run records of a `HAPOTrainer`: hands the trainer's values to `hapo.engines.records`."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...batch import TokenBatch
from ...method import LossOutput
from ..records import RunRecords, manifest, weights_hash

NOT_TOLD = {"hub_token", "accelerator_config", "debug", "gradient_checkpointing", "method", "method_options"}
"""Secrets, what TRL fills in itself, deprecated twins of other options, and what is written apart."""


class Recorder:
    """Opens the run folder of a trainer and feeds it."""

    def __init__(self, trainer: Any, checkpoint: str | None) -> None:
        self.trainer = trainer
        args = trainer.args
        folder, rank = Path(args.output_dir), args.process_index
        if checkpoint is not None:
            self.records = RunRecords.resume(folder, int(checkpoint.rsplit("-", 1)[1]), rank)
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        self.records = RunRecords.create(
            folder,
            config={
                **trainer.recipe,
                **_told(args),
                "method": trainer.method.name,
                "method_options": options_told(trainer),
            },
            manifest=manifest(
                seed=args.seed,
                model=str(model.config._name_or_path),
                weights_sha256=weights_hash(model),
                data_fingerprint=getattr(trainer.train_dataset, "_fingerprint", None),
                processes=args.world_size,
            ),
            rank=rank,
            need=_checkpoint_bytes(model) if args.save_strategy != "no" else 0,
        )

    @property
    def _step(self) -> int:
        """The optimiser step at work, from 1."""
        return int(self.trainer.state.global_step) + 1

    @property
    def _rollout(self) -> int:
        """Its rollout batch, from 1."""
        return (self._step - 1) // int(self.trainer.args.updates_per_rollout) + 1

    def takes_tokens(self) -> bool:
        """Whether the rollout batch at work is one to record."""
        every = self.trainer.args.record_tokens_every
        return bool(every) and (self._rollout == 1 or self._rollout % every == 0)

    def add_tokens(self, inputs: dict[str, Any], batch: TokenBatch, out: LossOutput) -> None:
        """Tokens of one pass of the step at work."""
        args = self.trainer.args
        rows = batch.group < max(1, args.record_tokens_rows // self.trainer.num_generations)
        if rows.any():
            first = 1 + (self._rollout - 1) * args.updates_per_rollout
            self._add(self._step, first, inputs, batch, out, rows)

    def write_tokens(self) -> None:
        """At the end of the step."""
        self.records.write_tokens(self._step)

    def _add(
        self, step: int, rollout: int, inputs: dict[str, Any], batch: TokenBatch, out: LossOutput, rows: Tensor
    ) -> None:
        trainer = self.trainer
        decode = trainer._tokenizer.batch_decode
        batch = batch.rows(rows)
        ids = inputs["completion_ids"][rows]
        prompts = zip(inputs["prompt_ids"][rows], inputs["prompt_mask"][rows].bool(), strict=True)
        assert batch.old_entropy is not None
        temperature = torch.full_like(batch.old_entropy, trainer.temperature)
        if trainer.method.temperature_rule is not None and trainer._sampled_with is not None:
            temperature = temperature * trainer.method.temperature_rule(batch.old_entropy, trainer._sampled_with)
        self.records.add_tokens(
            step,
            rollout,
            batch,
            {name: x[rows] for name, x in out.tokens.items()},
            mask=trainer.scored_tokens(inputs)[rows],
            response=inputs["hapo_response"][rows],
            responses=int(inputs["hapo_responses"]),
            ids=ids,
            texts=[decode([[t] for t in row]) for row in ids.tolist()],
            prompts=decode([row[mask] for row, mask in prompts]),
            temperature=temperature,
        )


def options_told(trainer: Any) -> dict[str, Any]:
    """The options of the trainer's method, without what TRL's `beta` says."""
    return {k: v for k, v in trainer.method.options.items() if k not in ("method", "kl_coef")}


def _told(args: Any) -> dict[str, Any]:
    """The options that differ from their defaults, as plain values: a recipe that `hapo train` reads back."""
    values = args.to_dict()
    told = {}
    for f in fields(args):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        value = values.get(f.name)
        if (
            f.init
            and f.name not in NOT_TOLD
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
