"""A training step with GateRA beside LoRA and HiRA of the same rank, in turns: processor seconds and memory.

    python -m bench.gatera --output bench/results/gatera_cpu.json

A model of SmolLM2-135M's shape with random weights, float32, rank 32 on the paper's modules; one forward and
backward pass over rows of 128 random tokens, no padding. GateRA adds the entropy of its gates to the loss.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hapo.adapters import GateRAConfig, add_gate_loss
from hapo.adapters.model import PAPERS_MODULES

from .paired import machine
from .turns import Baton, alternate, report, shown

CONFIGS = {
    "HiRA": partial(HiraConfig, target_modules=list(PAPERS_MODULES)),
    "GateRA on HiRA": partial(GateRAConfig, branch="hira"),
    "LoRA": partial(LoraConfig, lora_alpha=32, target_modules=list(PAPERS_MODULES)),
    "GateRA on LoRA": partial(GateRAConfig, branch="lora"),
}
MEMORY = ("peak", "grown")


def contend(baton: Baton, *, kind: str, rows: int, device: str) -> None:
    """A contender: one forward and backward pass a turn."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=1024,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).to(device)
    model = get_peft_model(model, CONFIGS[kind](r=32, task_type="CAUSAL_LM")).train()
    if kind.startswith("GateRA"):
        add_gate_loss(model)
    ids = torch.randint(49_152, (rows, 128)).to(device)
    while baton.begin():
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        baton.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kinds", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    contenders = {k: partial(contend, kind=k, rows=given.rows, device=given.device) for k in given.kinds}
    turns, _ = alternate(contenders, pairs=given.pairs, device=given.device)
    found = report(turns)
    result: dict[str, Any] = {
        "machine": machine(given.device, ("torch", "peft", "transformers")),
        "pairs": given.pairs,
        "rows": given.rows,
        **found,
    }
    for kind in given.kinds:
        print(f"{kind:16}" + f"{found['contenders'][kind]['cpu_s']['median']:8.2f} s")
    for a, b in (("GateRA on HiRA", "HiRA"), ("GateRA on LoRA", "LoRA")):
        if ratio := found["ratios"].get(f"{a} / {b}"):
            print(
                f"{a} / {b}: time {shown(ratio['cpu_s'])}, "
                + ", ".join(f"{m} {shown(ratio[f'{m}_mib'])}" for m in MEMORY)
            )
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
