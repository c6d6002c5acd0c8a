"""RankTuner's noise test: which weights give the heaviest targets to injected noise.

    python -m bench.noise_test --model models/SmolLM2-135M-Instruct --data gsm8k_train.jsonl \
        --output bench/results/noise_test.json

The file has the columns question and solution. In each solution a share of the target tokens is replaced by
tokens drawn uniformly from the vocabulary, a new draw with every seed; the model scores the noisy text, and every
weight ranks all targets. The figure is the share of noise among the tenth of the targets with the largest weights.
A weight that knows nothing of the noise has the share of all targets. Ties at the border are broken by the order
of the text.

The paper (arXiv 2602.01745) does not say, in what could be read of it, which noise it injects, how much, or which
"probability" weight it means: so p and 1 - p are both here, and RankTuner's scale without its base weight.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hapo
from hapo.insight.statistics import mean_interval
from hapo.scoring import Scores, attach_scoring, score_tokens

from .paired import machine

HEAVIEST = 0.1


def of(name: str, **options: Any) -> Callable[[hapo.TokenBatch], Tensor]:
    """The weights of a supervised method."""
    method = hapo.method(name, **options)
    return lambda batch: method.loss(batch).tokens["weight"]


WEIGHTS: dict[str, Callable[[hapo.TokenBatch], Tensor]] = {
    "entropy": lambda batch: batch.entropy,
    "1 - p": lambda batch: -torch.expm1(batch.logp),
    "p (dft)": of("dft"),
    "p (1 - p) (chord_phi)": of("chord_phi"),
    "ranktuner, approx": of("ranktuner", estimator="approx"),
    "ranktuner, exact": of("ranktuner", estimator="exact"),
    "ranktuner's scale alone, approx": of("ranktuner", estimator="approx", base_weight=1),
    "ranktuner's scale alone, exact": of("ranktuner", estimator="exact", base_weight=1),
}


def share_of_noise(weight: Tensor, noise: Tensor) -> float:
    """Of the noise among the heaviest targets."""
    heaviest = weight.argsort(descending=True, stable=True)[: round(HEAVIEST * len(weight))]
    return noise[heaviest].double().mean().item()


@torch.no_grad()
def score(model: Any, prompt: list[int], targets: list[int]) -> Scores:
    """Of the targets of one text."""
    ids = torch.tensor([prompt + targets])
    mask = torch.ones(1, len(targets), dtype=torch.bool)
    return score_tokens(model, ids, torch.ones_like(ids), mask, rank=True, expected_rank=True)


def run(model: Any, texts: list[tuple[list[int], list[int]]], rate: float, seed: int) -> dict[str, float]:
    """The share of noise by weight, for one draw of the noise."""
    draw = torch.Generator().manual_seed(seed)
    noises, found = [], []
    for prompt, targets in texts:
        noise = torch.rand(len(targets), generator=draw) < rate
        random = torch.randint(model.config.vocab_size, (len(targets),), generator=draw)
        noisy = torch.where(noise, random, torch.tensor(targets))
        noises.append(noise & (noisy != torch.tensor(targets)))
        found.append(score(model, prompt, noisy.tolist()))
    fields = {
        name: torch.cat([getattr(one, name) for one in found], dim=1)
        for name in ("logp", "entropy", "rank", "expected_rank")
    }
    batch = hapo.TokenBatch(mask=torch.ones_like(fields["logp"], dtype=torch.bool), **fields)
    noise = torch.cat(noises)
    shares = {name: share_of_noise(weight(batch)[0], noise) for name, weight in WEIGHTS.items()}
    return {"all targets": noise.double().mean().item(), **shares}


def main() -> None:
    """Score, print a table, and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=8, help="draws of the noise, at least 5")
    parser.add_argument("--rate", type=float, default=0.1, help="share of the targets that is replaced")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    words = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    attach_scoring(model)
    with given.data.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(given.texts), lines, strict=False)]
    texts = [(words(row["question"] + "\n")["input_ids"], words(row["solution"])["input_ids"]) for row in rows]
    began = time.process_time()
    runs = [run(model, texts, given.rate, seed) for seed in range(given.seeds)]
    table = {}
    for name in runs[0]:
        values = [one[name] for one in runs]
        mean = mean_interval(values)
        table[name] = {"mean": mean.mean, "low": mean.low, "high": mean.high, "runs": values}
        print(f"{name:34}{100 * mean.mean:6.1f} % [{100 * mean.low:.1f}, {100 * mean.high:.1f}]", flush=True)
    result = {
        "machine": machine(packages=("torch", "transformers")), "model": Path(given.model).name,
        "texts": len(texts), "targets": sum(len(targets) for _, targets in texts), "rate": given.rate,
        "cpu_s": round(time.process_time() - began), "table": table,
    }  # fmt: skip
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
