"""What a HAPO run needs beside TRL's checkpoint: statistics, position, and the rollout batch in progress.

Files in a checkpoint folder: `hapo_state.json`, written last, so that a folder without it is incomplete; and,
where the checkpoint falls inside a rollout batch, `hapo_rollout-RANK.safetensors` with what is left of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import hapo

from ...method import Method
from ...supervised import Supervised
from ..identity import differences, identity
from .config import HAPOConfig
from .rows import without_step

STATE = "hapo_state.json"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (p / STATE).is_file()]
    return sorted(found, key=lambda p: int(p.name.rsplit("-", 1)[1]))


def state_of(checkpoint: Path | str) -> TrainerState:
    """What transformers keeps of a run in a checkpoint: steps, tokens, log."""
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))


@dataclass
class RunState:
    """What is restored of a run, on this rank."""

    metrics: dict[str, list[float]]
    """Logged since the last line."""
    loss: dict[str, float]
    """Sums of transformers: since_log, last_log, total."""
    stats: hapo.EntropyStats | None = None
    """Of the last rollout batch; what follows is of policy runs alone."""
    sampled_with: hapo.EntropyStats | None = None
    """Those that it was drawn with."""
    micro_step: int = 0
    """Micro-batches so far."""
    fresh_prompts: int = 0
    """Position in the order of dynamic sampling."""
    mixed_share: float | None = None
    """Its share of mixed groups."""
    entropy_term: dict[str, float] = field(default_factory=dict)
    """Of `EntropyTerm`."""
    rollout: list[dict[str, Any]] | None = None
    """Micro-batches of the rollout batch in progress, prepared; None between two."""


def layout_of(args: HAPOConfig, processes: int) -> dict[str, Any]:
    """How a rollout batch is cut into micro-batches, optimiser steps and ranks."""
    names = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "steps_per_generation",
        "num_iterations",
    )
    whole = {"whole_groups": True} if args.whole_groups else {}
    return {"processes": processes, **{n: getattr(args, n) for n in names}, **whole}


def check_checkpoint(
    resume: bool | str | None, folder: Path, method: Method | Supervised, layout: dict[str, Any]
) -> str | None:
    """The checkpoint to resume from, as a path; None for a fresh start.

    `resume` is a path, or True for the last one in `folder`; `layout` is that of the run which goes on.

    Raises:
        ValueError: there is none, it is incomplete, or it is one of another method or schedule.
    """
    if not resume:
        return None
    if resume is True:
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
    if details := differences(state["method"], identity(method)):
        raise ValueError(
            f"{path} is a checkpoint of another method ({details}); resume with the method it was written with, "
            f"or {new}"
        )
    if details := differences(state["layout"], layout):
        if "demonstration" in details:
            raise ValueError(
                f"{path} was written with other demonstrations ({details}); resume with the same ones, or {new}"
            )
        raise ValueError(
            f"{path} was written under another schedule ({details}), and its rollout batch cannot be split anew; "
            f"resume with the same one, or {new}"
        )
    return str(path)


def save_state(
    folder: Path,
    state: RunState,
    accelerator: Accelerator,
    method: Method | Supervised,
    layout: dict[str, Any],
) -> None:
    """Write the files of this module into a checkpoint that TRL has just written."""
    rest = None
    if state.rollout is not None:
        tensors, rest = _pack([without_step(inputs) for inputs in state.rollout])
        save_file(tensors, folder / f"hapo_rollout-{accelerator.process_index}.safetensors")
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    written = {
        "version": hapo.__version__,
        "method": identity(method),
        "layout": layout,
        "stats": _to_json(state.stats),
        "sampled_with": _to_json(state.sampled_with),
        "micro_step": state.micro_step,
        "fresh_prompts": state.fresh_prompts,
        "mixed_share": state.mixed_share,
        "metrics": state.metrics,
        "loss": state.loss,
        "entropy_term": state.entropy_term,
        "rollout": rest,
    }
    partial = folder / f"{STATE}.partial"
    partial.write_text(json.dumps(written))
    os.replace(partial, folder / STATE)


def load_state(folder: Path, accelerator: Accelerator) -> RunState:
    """What `save_state` wrote, this rank's tensors on its device."""
    read = json.loads((folder / STATE).read_text())
    rollout = read["rollout"]
    if rollout is not None:
        file = folder / f"hapo_rollout-{accelerator.process_index}.safetensors"
        rollout = _unpack({k: v.to(accelerator.device) for k, v in load_file(file).items()}, rollout)
    names = ("micro_step", "fresh_prompts", "mixed_share", "metrics", "loss", "entropy_term")
    plain = {name: read[name] for name in names}
    stats, sampled_with = _from_json(read["stats"]), _from_json(read["sampled_with"])
    return RunState(stats=stats, sampled_with=sampled_with, rollout=rollout, **plain)


class OnceAtBegin(TrainerCallback):
    """Does one thing when training begins: after transformers has set its sums of the loss to 0."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act: Callable[[], None] | None = act

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Act, the first time."""
        if self.act is not None:
            self.act()
        self.act = None


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
