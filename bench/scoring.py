"""Scoring from hidden states, forward and backward: ours and TRL's fused head in turns, on one head and one batch.

    python -m bench.scoring --output bench/results/scoring_cpu.json
    HAPO_TRITON=1 python -m bench.scoring --device cuda --output bench/results/scoring_cuda.json

A Llama without layers and with a small table of embeddings, so that next to nothing but the head is run:
SmolLM2's (49,152 x 576) and that of Qwen2.5-1.5B (151,936 x 1,536), float32 on a CPU, bfloat16 on CUDA. Responses
of 64 tokens after prompts of 64 and of 256, all different. Log-probs and entropies are computed, log-probs go
backward, as in training. On a CPU TRL scores every position of a row; on CUDA those of the responses alone, as
ours does everywhere.

Memory: `peak` is all that the process holds, libraries, weights and their gradient included; `grown` is how far
that is above what was held when the turn began, the last turn's gradient among it: the buffers.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from hapo.scoring import attach_scoring, score_tokens

from .paired import machine
from .turns import Baton, alternate, report, shown

HEADS = {"49,152 x 576": (49_152, 576, 8), "151,936 x 1,536": (151_936, 1536, 2)}
"""Vocabulary, width, rows."""
RESPONSE = 64
SHAPES = {"1:1": 64, "4:1": 256}
"""Prompt tokens."""
MEMORY = ("peak", "grown")
ON_CUDA = 64
"""Times as many rows on CUDA."""


class FewEmbeddings(torch.nn.Embedding):
    """Hidden states for token ids beyond its table."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids % self.num_embeddings)


def model_of(vocabulary: int, width: int, device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=8, num_hidden_layers=0, num_attention_heads=4,
        tie_word_embeddings=False, max_position_embeddings=1024,
    )  # fmt: skip
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = LlamaForCausalLM(config)
    model.set_input_embeddings(FewEmbeddings(64, width))
    return model.to(device, dtype)


def ours(model: LlamaForCausalLM, ids: Tensor, mask: Tensor) -> Callable[[], object]:
    attach_scoring(model)
    attention = torch.ones_like(ids)

    def run() -> None:
        scores = score_tokens(model, ids, attention, mask)
        scores.logp.mean().backward()

    return run


def trls(model: LlamaForCausalLM, ids: Tensor, mask: Tensor) -> Callable[[], object]:
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    attention = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, : -mask.shape[1]] = -100

    def run() -> None:
        output = model(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True)
        output.log_probs[:, -mask.shape[1] :].mean().backward()

    return run


WORK = {"hapo.scoring": ours, "TRL's fused head": trls}


def contend(baton: Baton, *, work: str, head: str, prompt: int, device: str) -> None:
    """A contender: one forward and backward pass a turn."""
    vocabulary, width, rows = HEADS[head]
    rows *= 1 if device == "cpu" else ON_CUDA
    model = model_of(vocabulary, width, device)
    ids = torch.randint(vocabulary, (rows, prompt + RESPONSE)).to(device)
    run = WORK[work](model, ids, torch.ones((rows, RESPONSE), dtype=torch.bool, device=device))
    while baton.begin():
        model.zero_grad(set_to_none=True)
        run()
        baton.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    result: dict[str, Any] = {
        "machine": machine(given.device, ("torch", "trl", "transformers")),
        "pairs": given.pairs,
    }
    lines = [f"{'head':18}{'prompt':>8}{'ours, ms':>10}{'TRL, ms':>10}{'time':>20}"]
    lines[0] += "".join(f"{name + ', MiB':>16}{'ratio':>20}" for name in MEMORY)
    for head in HEADS:
        for shape, prompt in SHAPES.items():
            contenders = {
                work: partial(contend, work=work, head=head, prompt=prompt, device=given.device) for work in WORK
            }
            turns, _ = alternate(contenders, pairs=given.pairs, device=given.device)
            found = report(turns)
            result[f"{head}, {shape}"] = found
            both = [found["contenders"][work] for work in WORK]
            ratio = found["ratios"]["hapo.scoring / TRL's fused head"]
            line = f"{head:18}{shape:>8}" + "".join(f"{1e3 * one['cpu_s']['median']:10.1f}" for one in both)
            line += f"{shown(ratio['cpu_s']):>20}"
            for name in MEMORY:
                a, b = (one[f"{name}_mib"]["median"] for one in both)
                line += f"{f'{a:.0f} / {b:.0f}':>16}{shown(ratio[f'{name}_mib']):>20}"
            lines.append(line)
    print("\n".join(lines))
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
