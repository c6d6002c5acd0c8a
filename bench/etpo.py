"""Memory of ETPO's four networks beside that of one LoRA policy, and the cost of its vocabulary-wide targets.

    python -m bench.etpo --output bench/results/etpo_cpu.json

A model of SmolLM2-135M's shape with random weights, float32, adapters of rank 16 on all linear layers; rows of 64
context and 64 taken tokens. A unit of work is an update: for the policy alone a forward and backward pass of its
log-probs and a step of AdamW, for ETPO `hapo.loops.etpo.update`. The cost of the targets is that of values, KL and
what the records need over the vocabulary, beside the forward passes of the four networks, in processor seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hapo.loops import etpo
from hapo.loops.networks import SharedNetworks, hidden_states
from hapo.loops.options import ETPOConfig
from hapo.loops.packed import pack
from hapo.loops.turns import AgentTurn, Segment
from hapo.parts import soft_q
from hapo.scoring import attach_scoring, score_tokens

from .paired import machine
from .turns import Baton, alternate, report, shown

HALF = 64
"""Tokens of a context, and of a turn."""


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(shape).eval()


def config() -> LoraConfig:
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=16, lora_alpha=32, target_modules=layers, task_type="CAUSAL_LM")


def policy_alone(baton: Baton, *, rows: int) -> None:
    """A contender: one LoRA policy with its optimiser."""
    net: Any = get_peft_model(model(), config())
    attach_scoring(net)
    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-5)
    ids = torch.randint(49_152, (rows, 2 * HALF))
    mask = torch.ones(rows, HALF, dtype=torch.bool)
    while baton.begin():
        score_tokens(net, ids, torch.ones_like(ids), mask).logp.mean().neg().backward()
        optimiser.step()
        optimiser.zero_grad()
        baton.end()


def four_networks(baton: Baton, *, rows: int) -> None:
    """A contender: policy, critic, target critic and reference, with two optimisers."""
    networks = SharedNetworks(model(), config())
    optimisers = {n: torch.optim.AdamW(networks.parameters(n).values(), lr=1e-5) for n in etpo.LEARNING}
    args, accelerator = ETPOConfig(per_device_train_batch_size=rows), Accelerator(cpu=True)
    of = segments(rows)
    while baton.begin():
        etpo.update(networks, optimisers, of, args, accelerator, pad=0)
        baton.end()


def segments(rows: int) -> list[Segment]:
    found = []
    for i, ids in enumerate(torch.randint(49_152, (rows, 2 * HALF)).tolist()):
        found.append(Segment(i, 0, "", ids, 0, [AgentTurn(HALF, ids[HALF:], "", 1.0, goes_on=False)]))
    return found


def shares(rows: int, times: int) -> dict[str, float]:
    """Processor seconds of the four forward passes and of the targets over the vocabulary, medians."""
    networks, args = SharedNetworks(model(), config()), ETPOConfig()
    packed = pack(segments(rows), 0, torch.device("cpu"))
    passes, wide = [], []
    with torch.no_grad():
        for _ in range(times + 1):
            states, began = {}, time.process_time()
            for name in ("target", "critic", "reference", "policy"):
                with networks.use(name) as net:
                    states[name] = hidden_states(net, packed.ids, packed.attention, packed.at)
            between = time.process_time()
            q_of = partial(etpo._q, networks, args.critic)
            given = [packed.action.unsqueeze(-1), *states.values()]
            soft_q.in_chunks(
                partial(etpo._see, networks, q_of, args), given, soft_q.chunk_size(49_152, packed.at.device)
            )
            passes.append(between - began)
            wide.append(time.process_time() - between)
    middle = times // 2
    return {"forward_s": sorted(passes[1:])[middle], "targets_s": sorted(wide[1:])[middle]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    contenders = {
        "policy": partial(policy_alone, rows=given.rows),
        "etpo": partial(four_networks, rows=given.rows),
    }
    turns, _ = alternate(contenders, pairs=given.pairs, device="cpu")
    found = report(turns)
    cost = shares(given.rows, 3)
    result: dict[str, Any] = {
        "machine": machine("cpu", ("torch", "peft", "transformers")),
        "pairs": given.pairs,
        "rows": given.rows,
        **found,
        **cost,
    }
    ratio = found["ratios"]["etpo / policy"]
    print(f"four networks / one LoRA policy: peak memory {shown(ratio['peak_mib'])}, time {shown(ratio['cpu_s'])}")
    print(f"targets / four forward passes: {cost['targets_s'] / cost['forward_s']:.2f}")
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
