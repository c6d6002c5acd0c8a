"""An optimiser step of HAPO beside its own matrix products alone: what a step spends on anything else.

    python -m bench.update_products --output bench/results/update_products.json

A model of SmolLM2-135M's shape with random weights, float32, one thread. A step is that of
`bench.end_to_end --work smollm2`: 2 prompts of 85 tokens with 8 answers of 64 tokens each; scores, HAPO's loss,
backward pass, clipping, AdamW. Its products (mm, addmm, bmm, as torch dispatches them; those inside the attention
kernel are not among them) are noted once with shapes and strides, and run again alone, into tensors that exist.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import hapo
from hapo.scoring import attach_scoring, score_tokens

from .paired import machine, seconds, summary

PROMPTS, PROMPT, ANSWERS, ANSWER = 2, 85, 8, 64
PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "bmm": (0, 1)}
"""Operation of aten -> places of its two factors."""

Shape = tuple[tuple[int, ...], tuple[int, ...]]


class Noted(TorchDispatchMode):
    """Counts the products that run in its block, by the shapes and strides of their factors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[Shape, Shape]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and note it."""
        name = func._schema.name.removeprefix("aten::")
        if name in PRODUCTS:
            a, b = (args[place] for place in PRODUCTS[name])
            self.found[(tuple(a.shape), a.stride()), (tuple(b.shape), b.stride())] += 1
        return func(*args, **(kwargs or {}))


class Step:
    """One optimiser step over a rollout batch that is made once."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        shape = LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=1024,
        )  # fmt: skip
        self.model = LlamaForCausalLM(shape).train()
        attach_scoring(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        prompts = torch.randint(49_152, (PROMPTS, PROMPT)).repeat_interleave(ANSWERS, 0)
        self.ids = torch.cat([prompts, torch.randint(49_152, (len(prompts), ANSWER))], 1)
        self.mask = torch.ones(len(prompts), ANSWER, dtype=torch.bool)
        self.method = hapo.method("hapo")
        with torch.no_grad():
            scores = self.scores()
        batch = hapo.TokenBatch(
            mask=self.mask,
            old_logp=scores.logp,
            old_entropy=scores.entropy,
            reward=torch.tensor([0.0, 1.0]).repeat(len(prompts) // 2),
            group=torch.arange(PROMPTS).repeat_interleave(ANSWERS),
        )
        self.batch = self.method.prepare(batch)

    def scores(self) -> Any:
        """Of the model as it is."""
        return score_tokens(self.model, self.ids, torch.ones_like(self.ids), self.mask)

    def __call__(self) -> None:
        """Take it."""
        scores = self.scores()
        batch = self.batch.replace(logp=scores.logp, entropy=scores.entropy.detach())
        self.method.loss(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def products_of(noted: Counter[tuple[Shape, Shape]]) -> list[tuple[Tensor, Tensor, Tensor, int]]:
    """Factors, room for the result, and how often."""
    found = []
    for (a, b), count in noted.items():
        x, y = (torch.empty_strided(*shape).normal_() for shape in (a, b))
        found.append((x, y, x @ y, count))
    return found


def main() -> None:
    """Measure in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    step = Step()
    with Noted() as noted:
        step()
    products = products_of(noted.found)

    def alone() -> None:
        for a, b, out, count in products:
            for _ in range(count):
                torch.matmul(a, b, out=out)

    alone()
    turns: list[dict[str, float]] = []
    for number in range(given.pairs):
        order = {"step": step, "products": alone}
        turn = {name: seconds(order[name])[0] for name in list(order)[:: -1 if number % 2 else 1]}
        turns.append({name: round(turn[name], 3) for name in order})
        print(turns[-1], flush=True)
    flops = sum(2 * count * a.numel() * b.shape[-1] for a, b, _, count in products)
    result = {
        "machine": machine(packages=("torch", "transformers")),
        "products": sum(noted.found.values()),
        "teraflop": round(flops / 1e12, 3),
        "step over products": summary([turn["step"] / turn["products"] for turn in turns]),
        "turns": turns,
    }
    print(json.dumps({key: value for key, value in result.items() if key != "turns"}, indent=1))
    if given.output is not None:
        given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
