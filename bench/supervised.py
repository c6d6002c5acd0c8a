"""A supervised training step, TRL's `nll` and ours, in turns: processor seconds and memory.

    python -m bench.supervised --model models/SmolLM2-135M-Instruct --data gsm8k_train.jsonl \
        --output bench/results/supervised_smollm2.json
    python -m bench.supervised --vocabulary 151936 --tokenizer models/SmolLM2-135M-Instruct \
        --data gsm8k_train.jsonl --output bench/results/supervised_152k.json

The file has the columns question and solution. A turn is one forward and backward pass of a trainer over the same
rows, cut at 128 tokens, no optimiser; the loss is on the solutions. `--vocabulary` takes a model of
SmolLM2-135M's shape with random weights and that many tokens in the place of `--model`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from hapo.trl import SupervisedConfig, SupervisedTrainer

from .paired import machine
from .turns import Baton, alternate, report, shown

TRL = "TRL nll"
OURS: dict[str, dict[str, Any]] = {
    "sft": {"method": "sft"},
    "dft": {"method": "dft"},
    "ranktuner approx": {"method": "ranktuner", "method_options": {"estimator": "approx"}},
    "ranktuner exact": {"method": "ranktuner", "method_options": {"estimator": "exact"}},
}
GOALS = {"ranktuner approx": 1.05, "ranktuner exact": 1.25}
MEMORY = ("peak", "grown")


def demonstrations(file: Path, rows: int) -> Dataset:
    """The first questions and their solutions."""
    with file.open(encoding="utf-8") as lines:
        given = [json.loads(line) for _, line in zip(range(rows), lines, strict=False)]
    return Dataset.from_list([{"prompt": x["question"], "completion": "\n" + x["solution"]} for x in given])


def contend(
    baton: Baton,
    *,
    kind: str,
    model: str,
    tokenizer: str,
    vocabulary: int | None,
    data: Path,
    rows: int,
) -> float:
    """A contender: one forward and backward pass a turn."""
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tokenizer)
    if vocabulary:
        shape = LlamaConfig(
            vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=1024,
        )  # fmt: skip
        net: Any = LlamaForCausalLM(shape)
    else:
        net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder, "per_device_train_batch_size": rows, "max_length": 128, "use_cpu": True,
            "bf16": False, "report_to": "none", "gradient_checkpointing": False, "save_strategy": "no",
            "disable_tqdm": True,
        }  # fmt: skip
        make: Any = (
            partial(SFTTrainer, args=SFTConfig(**common, loss_type="nll"))
            if kind == TRL
            else partial(SupervisedTrainer, args=SupervisedConfig(**common, **OURS[kind]))
        )
        trainer = make(model=net, train_dataset=demonstrations(data, rows), processing_class=words)
        inputs = next(iter(trainer.get_train_dataloader()))
        targets = (inputs["labels"][:, 1:] != -100).sum()
        trainer.model.train()
        loss = float("nan")
        while baton.begin():
            trainer.model.zero_grad(set_to_none=True)
            loss = trainer.training_step(trainer.model, dict(inputs), num_items_in_batch=targets).item()
            baton.end()
    return loss


def main() -> None:
    """Take the turns, and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--tokenizer", help="of another model than --model")
    parser.add_argument("--vocabulary", type=int, help="a model with random weights and that many tokens")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", choices=OURS, default=["ranktuner approx", "ranktuner exact"])
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    same = {
        "model": given.model, "tokenizer": given.tokenizer or given.model, "vocabulary": given.vocabulary,
        "data": given.data, "rows": given.rows,
    }  # fmt: skip
    turns, losses = alternate(
        {k: partial(contend, kind=k, **same) for k in (TRL, *given.kinds)}, pairs=given.pairs
    )
    found = report(turns)
    print(f"{TRL:18}{found['contenders'][TRL]['cpu_s']['median']:8.2f} s")
    for kind in given.kinds:
        ratio = found["ratios"][f"{kind} / {TRL}"]
        goal = f" (goal {GOALS[kind]})" if kind in GOALS and not given.vocabulary else ""
        print(f"{kind:18}{found['contenders'][kind]['cpu_s']['median']:8.2f} s, over {TRL}: time ", end="")
        print(shown(ratio["cpu_s"]) + goal, *(f"{m} {shown(ratio[f'{m}_mib'])}" for m in MEMORY), sep=", ")
    result = {
        "machine": machine(packages=("torch", "trl", "transformers")),
        "model": Path(given.model).name, "vocabulary": given.vocabulary,
        "pairs": given.pairs, "rows": given.rows, "losses": losses, **found,
    }  # fmt: skip
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
