"""What verl should have computed, from the token records alone: plain torch, the core, and verl's optimiser settings."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hapo
from tests.verl.launch import EPS, RATE

COLUMNS = {"logp_old": "old_logp", "logp_sampler": "sampler_logp", "entropy": "old_entropy"}


@dataclass
class Step:
    """One optimiser step: what verl recorded, and what the replay found, each a token's."""

    theirs: pd.DataFrame
    logp: Tensor
    loss: float
    grad_norm: float


@dataclass
class RolloutBatch:
    """One global step of verl."""

    old_logp: tuple[Tensor, Tensor]
    """Theirs and ours, valid tokens."""
    old_entropy: tuple[Tensor, Tensor]
    signal: tuple[Tensor, Tensor] | None
    advantage: tuple[Tensor, Tensor]
    """Theirs, and the core's on the log-probs and entropies that verl recorded."""
    weight: tuple[Tensor, Tensor]
    steps: list[Step]
    clipped: float


def tokens(folder: Path) -> pd.DataFrame:
    """All token records of a run."""
    files = sorted((folder / "tokens").glob("*.parquet"))
    return pd.concat([pq.read_table(file).to_pandas() for file in files], ignore_index=True)


def replay(inputs: Path, folder: Path, method: hapo.Method) -> list[RolloutBatch]:
    """Train the model of `inputs` again, on what the run in `folder` drew."""
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    model = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=EPS, weight_decay=0.01)
    table = tokens(folder)
    rollouts = table.groupby("rollout", sort=True)
    return [_rollout(part, tokenizer, model, optimiser, method) for _, part in rollouts]


def _rollout(
    table: pd.DataFrame,
    tokenizer: object,
    model: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    method: hapo.Method,
) -> RolloutBatch:
    first = table.drop_duplicates(["response", "position"]).sort_values(["response", "position"])
    whole = _Rows(first, tokenizer)
    with torch.no_grad():
        old_logp, old_entropy = whole.score(model)
    heads = first.drop_duplicates("response")
    batch = hapo.TokenBatch(
        mask=whole.mask,
        old_logp=old_logp,
        old_entropy=old_entropy,
        sampler_logp=whole.padded("logp_sampler"),
        reward=torch.tensor(heads["reward"].to_numpy()),
        verdict=torch.tensor(heads["verdict"].to_numpy()),
        group=torch.tensor(heads["group"].to_numpy()),
        token_reward=whole.padded("token_reward") if method.credit is not None else None,
    )
    prepared = method.prepare(batch)
    theirs = {ours: whole.padded(column) for column, ours in COLUMNS.items()}
    on_theirs = method.prepare(batch.replace(**theirs))  # entropies that differ in the last digits aside
    assert on_theirs.advantage is not None and prepared.weight is not None
    steps = []
    for _, part in table.groupby("step", sort=True):
        part = part.sort_values(["response", "position"])
        rows = _Rows(part, tokenizer)
        chosen = prepared.rows([whole.responses.index(r) for r in rows.responses])
        logp, entropy = rows.score(model)
        width = whole.mask.shape[1] - logp.shape[1]
        logp = torch.nn.functional.pad(logp, (0, width))
        entropy = torch.nn.functional.pad(entropy, (0, width))
        chosen = method.step(chosen.replace(logp=logp.detach(), entropy=entropy.detach()))
        loss = method.loss(chosen.replace(logp=logp)).loss
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        valid = torch.nn.functional.pad(rows.mask, (0, width))
        steps.append(Step(part, logp.detach()[valid], float(loss.detach()), float(norm)))
    used = prepared.mask[whole.mask].numpy()

    def pair(column: str, ours: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tensor(first[column].to_numpy()[used]), ours[whole.mask][used]

    return RolloutBatch(
        old_logp=pair("logp_old", old_logp),
        old_entropy=pair("entropy", old_entropy),
        signal=None if prepared.signal is None else pair("signal", prepared.signal),
        advantage=pair("advantage", on_theirs.advantage),
        weight=pair("weight", prepared.weight),
        steps=steps,
        clipped=float(table["clipped"].mean()),
    )


class _Rows:
    """Responses of a table as padded tensors, one forward pass each."""

    def __init__(self, table: pd.DataFrame, tokenizer: object) -> None:
        self.table = table
        self.responses = table["response"].drop_duplicates().tolist()
        self.ids = [of["id"].tolist() for _, of in table.groupby("response", sort=True)]
        self.prompts = [
            tokenizer(prompt, add_special_tokens=False)["input_ids"]
            for prompt in table.drop_duplicates("response")["prompt"]
        ]
        width = max(map(len, self.ids))
        self.mask = torch.tensor([[i < len(ids) for i in range(width)] for ids in self.ids])

    def padded(self, column: str) -> Tensor:
        out = torch.zeros(self.mask.shape)
        out[self.mask] = torch.tensor(self.table[column].to_numpy().astype(np.float32))
        return out

    def score(self, model: torch.nn.Module) -> tuple[Tensor, Tensor]:
        logps, entropies, width = [], [], self.mask.shape[1]
        for prompt, ids in zip(self.prompts, self.ids, strict=True):
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            all_logps = logits.log_softmax(-1)
            logp = all_logps.gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1)
            entropy = -(all_logps.exp() * all_logps).sum(-1)
            pad = (0, width - len(ids))
            logps.append(torch.nn.functional.pad(logp, pad))
            entropies.append(torch.nn.functional.pad(entropy, pad))
        return torch.stack(logps), torch.stack(entropies)
