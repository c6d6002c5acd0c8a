"""Seconds that a rollout saves when vLLM hands over entropies and log-probs of its draws: paired and alternating.

    python -m bench.vllm_unscored --output bench/results/vllm_unscored.json

A trainer with colocated vLLM and random weights in the shape of SmolLM2-135M makes the same rollout batch again
and again, with `score_rollouts` on and off in turns, at a learning rate of 0. Reported, as median and quartiles
over the pairs: processor seconds of the whole rollout, and of the scoring pass alone.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

import trl.generation.vllm_generation as backend
from datasets import Dataset
from transformers import AutoTokenizer

from hapo.assets import tiny_model_path
from hapo.trl import HAPOConfig, HAPOTrainer

from .paired import machine, seconds, summary
from .vllm_step import model

backend.LLM = partial(backend.LLM, dtype="float32")


def make_trainer(folder: str, rows: int, tokens: int) -> HAPOTrainer:
    """A trainer whose answers have `tokens` tokens at most, of a model that knows nothing."""
    model(folder, 49152, "smollm2-135m").save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_path()).save_pretrained(folder)
    args = HAPOConfig(
        f"{folder}/run", method="hapo", score_rollouts=False, per_device_train_batch_size=rows, num_generations=8,
        steps_per_generation=1, num_iterations=2, max_completion_length=tokens, max_steps=2, learning_rate=0.0,
        use_cpu=True, bf16=False, use_vllm=True, report_to="none", save_strategy="no", vllm_max_model_length=128,
        vllm_gpu_memory_utilization=0.3,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(100, 140) for b in range(100, 140)])
    return HAPOTrainer(folder, lambda completions, **_: [0.0] * len(completions), args=args, train_dataset=data)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, given.rows, given.tokens)
        found = measure(trainer, given.rows, given.pairs)
    saved = [1 - b / a for a, b in zip(found["scored"], found["unscored"], strict=True)]
    told: dict[str, Any] = {
        **machine(), "rows": given.rows, "tokens": given.tokens, **found,
        "summary": {name: summary(values) for name, values in {**found, "saved share": saved}.items()},
    }  # fmt: skip
    print(json.dumps(told["summary"], indent=2))
    if given.output:
        given.output.write_text(json.dumps(told, indent=2) + "\n")


def measure(trainer: HAPOTrainer, rows: int, pairs: int) -> dict[str, list[float]]:
    """Processor seconds of rollouts in turns."""
    drawn = trainer.scorer.drawn
    drawn._gap, drawn._rollouts = 0.0, 2**20  # none of these is compared
    inputs = [dict(trainer.train_dataset[i // 8]) for i in range(rows)]
    passes: list[float] = []
    text = trainer.scorer.text

    def timed(*args: Any) -> Any:
        scores: list[Any] = []
        passes.append(seconds(lambda: scores.append(text(*args)))[0])
        return scores[0]

    trainer.scorer.text = timed  # type: ignore[method-assign]
    trainer.model.train()
    found: dict[str, list[float]] = {"scored": [], "unscored": []}
    for pair in range(-1, pairs):  # the first is to warm up
        for unscored in ((False, True), (True, False))[pair % 2]:
            drawn.trusted = trainer.sampler.log = unscored  # type: ignore[attr-defined]
            took = seconds(lambda: trainer._generate_and_score_completions(inputs))[0]
            if pair >= 0:
                found["unscored" if unscored else "scored"].append(took)
    return {**found, "scoring pass": passes[-pairs:]}


if __name__ == "__main__":
    main()
