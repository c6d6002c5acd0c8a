"""A run folder of demonstrations, made of thin air: what the core says of random scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

import hapo
from hapo.engines.records import RunRecords

WORDS = [" the", "7", "+", " so", "=", "12"]


def make_demonstrations(
    folder: Path,
    method: str = "ranktuner",
    losses: Sequence[float] = (2.0, 1.0),
    finished: bool = True,
    steps: Sequence[int] = (1, 5),
) -> Path:
    """Write a run folder and return it: `losses` every fourth step, held out and trained, targets at `steps`."""
    records = RunRecords.create(
        folder, {"method": method, "output_dir": str(folder)}, {"seed": 3, "kind": "supervised"}
    )
    g = torch.Generator().manual_seed(1)
    for i, loss in enumerate(losses):
        records.add_metrics({"step": 4 * i, "eval_loss": loss})
        records.add_metrics({"step": 4 * i + 1, "loss": loss, "entropy": 2.0, "weight": 0.4, "grad_norm": 1.0})
    for step in steps:
        rank = 1 + (40 * torch.rand(5, 7, generator=g).square()).floor()
        batch = hapo.TokenBatch(
            mask=torch.arange(7) < torch.tensor([[7], [3], [5], [1], [6]]),
            logp=-rank.log() - torch.rand(5, 7, generator=g),
            entropy=3 * torch.rand(5, 7, generator=g),
            rank=rank,
            expected_rank=1 + 9 * torch.rand(5, 7, generator=g),
        )
        weight = hapo.method(method).loss(batch).tokens["weight"]
        ids = torch.randint(len(WORDS), (5, 7), generator=g)
        texts = [[WORDS[i] for i in row] for row in ids.tolist()]
        records.add_targets(step, batch, weight, torch.arange(5), ids, texts, [f"ask {i}" for i in range(5)])
        records.write_tokens(step)
    if finished:
        (folder / "finished.json").write_text(json.dumps({"steps": 5, "why": "max_steps", "seconds": 3}))
    return folder
