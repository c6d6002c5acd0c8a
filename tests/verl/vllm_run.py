"""Runs of verl with its vLLM rollout on CPU, and what vLLM must have drawn from: transformers' forward, nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hapo.batch import EntropyStats
from hapo.parts.temperature import bounded_factor
from tests.verl.launch import ACTOR, ROLLOUT, VerlRun
from tests.verl.replay import tokens

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}

T_BASE, TAU = 0.9, 0.5

ON_VLLM = (
    f"{ROLLOUT}.name=vllm",
    f"{ROLLOUT}.dtype=float32",
    f"{ROLLOUT}.temperature={T_BASE}",
    f"{ROLLOUT}.enforce_eager=True",
    f"+{ROLLOUT}.enable_sleep_mode=False",  # a CPU has none
    f"{ROLLOUT}.gpu_memory_utilization=0.1",
    f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes=16",
    f"+{ROLLOUT}.engine_kwargs.vllm.worker_extension_cls=hapo.engines.verl_cpu.vllm.WorkerExtension",
    f"{ACTOR}.optim.lr=1e-3",  # weights move, and stay far from certain
    "trainer.total_training_steps=3",
    "+hapo.method=hapo",
    f"+hapo.options.temperature={{tau:{TAU}}}",
)


class Rollout:
    """The tokens of a rollout batch, one row each (N): what verl recorded, and what was to be expected."""

    def __init__(self, run: VerlRun, step: int) -> None:
        table = tokens(run.out)
        batches = [batch for _, batch in table.groupby("rollout", sort=True)]
        self.run, self.step = run, step
        self.table = (
            batches[step - 1].drop_duplicates(["response", "position"]).sort_values(["response", "position"])
        )

    def column(self, name: str) -> Tensor:
        """Of the record."""
        return torch.tensor(self.table[name].to_numpy(np.float64))

    def logits(self, step: int | None = None) -> Tensor:
        """(N,V) of the weights that drew it, or of those after another global step, float64."""
        model = _weights_after(self.run, self.step - 1 if step is None else step)
        tokenizer = AutoTokenizer.from_pretrained(self.run.inputs / "model")
        rows = []
        for _, response in self.table.groupby("response", sort=True):
            prompt = tokenizer.encode(response["prompt"].iloc[0])
            ids = torch.tensor([prompt + response["id"].tolist()])
            with torch.no_grad():
                rows.append(model(ids).logits[0, len(prompt) - 1 : -1].double())
        return torch.cat(rows)

    def logp(self, logits: Tensor, temperature: Tensor | float = T_BASE) -> Tensor:
        """Of the taken tokens, at these temperatures (N)."""
        divided = logits / torch.as_tensor(temperature).reshape(-1, 1)
        return divided.log_softmax(-1).gather(1, torch.tensor(self.table["id"].to_numpy())[:, None])[:, 0]

    def temperature(self, logits: Tensor) -> Tensor:
        """By the statistics in the checkpoint of the step before; T_base in the first step."""
        if self.step == 1:
            return torch.full((len(logits),), T_BASE, dtype=torch.float64)
        state = json.loads((_checkpoint(self.run, self.step - 1) / "hapo.json").read_text())
        entropy = torch.special.entr((logits / T_BASE).softmax(-1)).sum(-1)
        return T_BASE * bounded_factor(entropy, EntropyStats(**state["stats"]), TAU).double()


def _checkpoint(run: VerlRun, step: int) -> Path:
    return run.out / f"global_step_{step}"


def _weights_after(run: VerlRun, step: int) -> PreTrainedModel:
    """The model after a global step of verl; 0 is the model that it began with."""
    model = AutoModelForCausalLM.from_pretrained(run.inputs / "model", dtype=torch.float32).eval()
    if step:
        file = _checkpoint(run, step) / "actor" / "model_world_size_1_rank_0.pt"
        state = torch.load(file, weights_only=False)
        model.load_state_dict({name: getattr(w, "_local_tensor", w) for name, w in state.items()})
    return model


def hide_entry_points(folder: Path) -> str:
    """A PYTHONPATH on which an installed hapo has no entry points."""
    metadata = folder / "hapo-0.0.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: hapo\nVersion: 0.0.0\n")
    return str(folder)
