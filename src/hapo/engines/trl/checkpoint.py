"""What a HAPO run needs beside TRL's checkpoint: statistics, position, and the rollout batch in progress.

Files in a checkpoint folder: `hapo_state.json`, written last, so that a folder without it is incomplete; and,
where the checkpoint falls inside a rollout batch, `hapo_rollout-RANK.safetensors` with what is left of it.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import hapo

from ..identity import differences, identity

STATE = "hapo_state.json"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (p / STATE).is_file()]
    return sorted(found, key=lambda p: int(p.name.rsplit("-", 1)[1]))


def check_checkpoint(trainer: Any, resume: bool | str | None) -> str | None:
    """The checkpoint to resume from, as a path; None for a fresh start.

    Raises:
        ValueError: there is none, it is incomplete, or it is one of another method.
    """
    if not resume:
        return None
    if resume is True:
        folder = Path(trainer._get_output_dir(None))
        found = complete_checkpoints(folder)
        if not found:
            raise ValueError(f"there is no complete checkpoint in {folder} to resume from; start without resuming")
        resume = str(found[-1])
    path = Path(resume)
    if not (path / STATE).is_file():
        raise ValueError(
            f"{path} has no {STATE}: it is no HAPO checkpoint, or its writing was cut short; "
            "resume from an earlier checkpoint-N folder of the run"
        )
    state = json.loads((path / STATE).read_text())
    new = "start a new run from its weights with model_name_or_path"
    if details := differences(state["method"], identity(trainer.method)):
        raise ValueError(
            f"{path} is a checkpoint of another method ({details}); resume with the method it was written with, "
            f"or {new}"
        )
    if details := differences(state["layout"], _layout(trainer)):
        raise ValueError(
            f"{path} was written under another schedule ({details}), and its rollout batch cannot be split anew; "
            f"resume with the same one, or {new}"
        )
    return str(path)


def save_state(trainer: Any, folder: Path) -> None:
    """Write the files of this module into a checkpoint that TRL has just written."""
    every = trainer.args.steps_per_generation * trainer.num_iterations
    rollout: list[dict[str, Any]] | None = None
    if trainer._step % every and trainer._buffered_inputs is not None:
        tensors, rollout = _pack(trainer._buffered_inputs)
        save_file(tensors, folder / f"hapo_rollout-{trainer.accelerator.process_index}.safetensors")
    loss = {
        "since_log": trainer.accelerator.gather(trainer._tr_loss.detach()).mean().item(),
        "last_log": trainer._globalstep_last_logged,
        "total": trainer._total_loss_scalar,
    }
    trainer.accelerator.wait_for_everyone()
    if not trainer.accelerator.is_main_process:
        return
    dynamic = trainer._dynamic
    state = {
        "version": hapo.__version__,
        "method": identity(trainer.method),
        "layout": _layout(trainer),
        "stats": _to_json(trainer.temperature_stats),
        "sampled_with": _to_json(trainer._sampled_with),
        "micro_step": trainer._step,
        "fresh_prompts": 0 if dynamic is None else dynamic.prompts.position,
        "mixed_share": None if dynamic is None else dynamic.share,
        "metrics": trainer._metrics["train"],
        "loss": loss,
        "rollout": rollout,
    }
    partial = folder / f"{STATE}.partial"
    partial.write_text(json.dumps(state))
    os.replace(partial, folder / STATE)


def load_state(trainer: Any, folder: Path) -> None:
    """Put a trainer where the checkpoint left it."""
    state = json.loads((folder / STATE).read_text())
    trainer.temperature_stats = _from_json(state["stats"])
    trainer._sampled_with = _from_json(state["sampled_with"])
    trainer._step = state["micro_step"]
    trainer.add_callback(_RestoreLoss(trainer, state["loss"]))
    trainer._metrics["train"] = defaultdict(list, state["metrics"])
    if trainer._dynamic is not None:
        trainer._dynamic.prompts.position = state["fresh_prompts"]
        trainer._dynamic.share = state["mixed_share"]
    if state["rollout"] is not None:
        file = folder / f"hapo_rollout-{trainer.accelerator.process_index}.safetensors"
        tensors = {k: v.to(trainer.accelerator.device) for k, v in load_file(file).items()}
        trainer._buffered_inputs = _unpack(tensors, state["rollout"])


class _RestoreLoss(TrainerCallback):
    """Once, after transformers has set its sums of the loss to 0: what they were at the checkpoint."""

    def __init__(self, trainer: Any, loss: dict[str, Any]) -> None:
        self.trainer = trainer
        self.loss = loss

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Restore, and go."""
        self.trainer._tr_loss.fill_(self.loss["since_log"])
        self.trainer._globalstep_last_logged = self.loss["last_log"]
        self.trainer._total_loss_scalar = self.loss["total"]
        self.trainer._initial_global_step = 0  # the mean loss is of the whole run
        self.trainer.remove_callback(self)


def _layout(trainer: Any) -> dict[str, Any]:
    """How a rollout batch is cut into micro-batches, optimiser steps and ranks."""
    names = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "steps_per_generation",
        "num_iterations",
    )
    return {"processes": trainer.accelerator.num_processes, **{n: getattr(trainer.args, n) for n in names}}


def _to_json(stats: hapo.EntropyStats | None) -> dict[str, float] | None:
    return None if stats is None else stats.to_dict()


def _from_json(stats: dict[str, Any] | None) -> hapo.EntropyStats | None:
    return None if stats is None else hapo.EntropyStats(**stats)


def _pack(batches: list[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    tensors: dict[str, torch.Tensor] = {}
    rest: list[dict[str, Any]] = []
    for i, batch in enumerate(batches):
        rest.append({})
        for name, value in batch.items():
            if name in ("hapo_totals", "hapo_keep"):
                continue  # made anew at the beginning of each optimiser step
            if isinstance(value, torch.Tensor):
                tensors[f"{i}.{name}"] = value.detach().contiguous().clone()
            else:
                rest[-1][name] = value
    return tensors, rest


def _unpack(tensors: dict[str, torch.Tensor], rest: list[dict[str, Any]]) -> list[dict[str, Any]]:
    batches = [dict(r) for r in rest]
    for key, value in tensors.items():
        i, name = key.split(".", 1)
        batches[int(i)][name] = value
    return batches
