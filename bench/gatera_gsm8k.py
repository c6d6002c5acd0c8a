"""Held-out loss of GSM8K's text after a short training: GateRA beside HiRA and LoRA, tuned rates, paired seeds.

    python -m bench.gatera_gsm8k ../shared/data/math/gsm8k_train.jsonl --output bench/results/gatera_gsm8k.json

SmolLM2-135M-Instruct (`make smollm2`), rank 32 on the paper's modules, bfloat16 autocast over float32 weights. The
data are rows of `question`, `solution` and `answer`; their text is cut into rows of 64 tokens, all of which are
predicted. A run is a few steps of AdamW, its rate falling linearly to 0. A seed decides the order of the rows, the
first A of each module, which is the same in all arms, and the gates.

The rate of each arm is chosen on a seed and texts of its own: three rates, and further ones while the best is
at an end. Every finished run is a line beside the output (`.jsonl`); a study that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd
import torch
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hapo.adapters import GateRAConfig, record_gates
from hapo.adapters.model import PAPERS_MODULES
from hapo.insight.statistics import holm, mean_interval, paired_difference, verdict

from .paired import machine

CONFIGS: dict[str, Callable[..., Any]] = {
    "LoRA": partial(LoraConfig, lora_alpha=32, target_modules=list(PAPERS_MODULES)),
    "HiRA": partial(HiraConfig, target_modules=list(PAPERS_MODULES)),
    "GateRA": partial(GateRAConfig, entropy_weight=0.01),
    "GateRA without entropy": partial(GateRAConfig, entropy_weight=0.0),
    "GateRA, constant gate": partial(GateRAConfig, entropy_weight=0.0, gate_std=0.0),
}
FIRST = {"LoRA": 3e-3} | dict.fromkeys(list(CONFIGS)[1:], 3e-2)
"""Arm -> the middle of the three rates."""

CONTRASTS = (
    ("HiRA", "LoRA"),
    ("GateRA", "LoRA"),
    ("GateRA", "HiRA"),
    ("GateRA without entropy", "HiRA"),
    ("GateRA, constant gate", "HiRA"),
    ("GateRA", "GateRA without entropy"),
    ("GateRA without entropy", "GateRA, constant gate"),
)
"""The family of Holm's correction."""

GATES = ("gate", "over_tokens", "over_modules", "entropy")
"""Mean of the gates; deviation over the tokens of a module, and over the means of modules; entropy in nats."""

TUNED_ON = 1000
"""The seed on which rates are chosen, and none is compared."""

AT_ONCE = 16
"""Rows of a pass that measures."""


@dataclass(frozen=True)
class Settings:
    """What a run is."""

    model: str
    steps: int = 16
    rows: int = 4
    length: int = 64
    measured: int = 32
    """Rows of the held-out text, and of the text that rates are chosen on."""


@dataclass(frozen=True)
class Texts:
    """Rows of tokens, (N, length); no problem is in two of them."""

    train: Tensor
    tune: Tensor
    held_out: Tensor


def read_texts(path: Path, settings: Settings) -> Texts:
    """The first problems of the file are those to train on, the last ones those that measure."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    with path.open() as lines:
        problems = [json.loads(line) for line in lines]

    def rows(some: list[dict[str, str]], most: int | None = None) -> Tensor:
        texts = [f"Question: {p['question']}\nAnswer: {p['solution']}\n#### {p['answer']}" for p in some]
        stream = [t for ids in tokenizer(texts)["input_ids"] for t in [*ids, tokenizer.eos_token_id]]
        whole = len(stream) // settings.length
        return torch.tensor(stream[: whole * settings.length]).view(whole, -1)[:most]

    n = len(problems) // 10
    return Texts(
        train=rows(problems[: 4 * n]),
        tune=rows(problems[8 * n : 9 * n], settings.measured),
        held_out=rows(problems[9 * n :], settings.measured),
    )


def adapted(base: nn.Module, arm: str, seed: int) -> PeftModel:
    """A copy of the base model with the arm's adapter, whose first A is that of the other arms."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), CONFIGS[arm](r=32, task_type="CAUSAL_LM")).train()
    draw = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():  # all arms have them in the model's order
        if "_A." in name:
            bound = p.shape[1] ** -0.5
            nn.init.uniform_(p, -bound, bound, generator=draw)
        elif "_gate." in name and name.endswith("weight") and arm == "GateRA, constant gate":
            p.requires_grad_(False)  # it is 0: the gate has a bias that is trained, and does not read the token
    return model


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Nats per predicted token."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=rows, labels=rows).loss


@torch.no_grad()
def measure(model: nn.Module, rows: Tensor) -> float:
    """Nats per predicted token; all rows are of one length."""
    parts = rows.split(AT_ONCE)
    return sum(float(loss_of(model, part)) * len(part) for part in parts) / len(rows)


@torch.no_grad()
def gates_of(model: PeftModel, rows: Tensor) -> dict[str, float]:
    """`GATES` on these rows."""
    with record_gates(model) as gates:
        loss_of(model, rows)
    logits = gates.take().flatten(0, 1)
    g = torch.sigmoid(logits)
    entropy = torch.distributions.Bernoulli(logits=logits).entropy()
    found = {
        "gate": g.mean(),
        "over_tokens": g.std(0).mean(),
        "over_modules": g.mean(0).std(),
        "entropy": entropy.mean(),
    }
    return {name: round(float(x), 5) for name, x in found.items()}


def train(base: nn.Module, texts: Texts, settings: Settings, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """One run, measured on the text for its seed."""
    began = time.process_time()
    model = adapted(base, arm, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=settings.steps)
    order = torch.randperm(len(texts.train), generator=torch.Generator().manual_seed(seed))
    weight, losses = getattr(model.peft_config["default"], "entropy_weight", 0.0), []
    for step in range(settings.steps):
        rows = texts.train[order[step * settings.rows : (step + 1) * settings.rows]]
        with record_gates(model) as gates:
            loss = loss_of(model, rows)
        losses.append(round(loss.item(), 4))
        if weight:
            valid = torch.ones_like(rows, dtype=torch.bool)
            valid[:, -1] = False  # it predicts nothing
            loss = loss + weight * gates.entropy(valid)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
    found = measure(model, texts.tune if seed == TUNED_ON else texts.held_out)
    return {
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "loss": round(found, 6) if math.isfinite(found) else None,
        "train": losses,
        **(gates_of(model, texts.held_out[:AT_ONCE]) if arm.startswith("GateRA") else {}),
        "cpu_s": round(time.process_time() - began, 1),
    }


class Study:
    """Runs, each made once.

    Args:
        file: of the finished runs; the first line says what they are.
        settings: of all runs.
        texts: read once.
        base: the model without an adapter.

    Raises:
        ValueError: the file has runs of other settings.
    """

    def __init__(self, file: Path, settings: Settings, texts: Texts, base: nn.Module) -> None:
        self.file, self.settings, self.texts, self.base = file, settings, texts, base
        head = asdict(settings)
        if not file.exists():
            file.write_text(json.dumps(head) + "\n")
        first, *lines = (json.loads(line) for line in file.read_text().splitlines())
        if first != head:
            raise ValueError(f"{file} has runs of {first}, not of {head}: name another output, or remove it")
        self.runs = {(run["arm"], run["rate"], run["seed"]): run for run in lines}

    def run(self, arm: str, rate: float, seed: int) -> float:
        """Loss of this run in nats per token; infinite where it diverged."""
        if (arm, rate, seed) not in self.runs:
            made = train(self.base, self.texts, self.settings, arm, rate, seed)
            self.runs[arm, rate, seed] = made
            with self.file.open("a") as out:
                out.write(json.dumps(made) + "\n")
            print(json.dumps({name: x for name, x in made.items() if name != "train"}), flush=True)
        loss = self.runs[arm, rate, seed]["loss"]
        return math.inf if loss is None else loss

    def tune(self, arm: str) -> dict[float, float]:
        """Rates -> loss on the text for tuning; the best one is at no end."""
        tuned(lambda rate: self.run(arm, rate, TUNED_ON), FIRST[arm])
        rates = [rate for one, rate, seed in self.runs if (one, seed) == (arm, TUNED_ON)]
        return {rate: self.run(arm, rate, TUNED_ON) for rate in sorted(rates)}


def tuned(loss: Callable[[float], float], first: float) -> dict[float, float]:
    """Rate -> loss: of three rates around the first, and of further ones until the best has two neighbours."""
    at = round(4 * math.log10(first))
    tried = {k: loss(rate_of(k)) for k in (at - 1, at, at + 1)}
    while (best := min(tried, key=lambda k: tried[k])) in (min(tried), max(tried)):
        k = best - 1 if best == min(tried) else best + 1
        tried[k] = loss(rate_of(k))
    return {rate_of(k): tried[k] for k in sorted(tried)}


def rate_of(k: int) -> float:
    """10^(k/4), to one digit."""
    return float(f"{10 ** (k / 4):.0e}")


def summarise(study: Study, seeds: int) -> dict[str, Any]:
    """Losses of all arms at their best rates, and the contrasts."""
    arms: dict[str, Any] = {}
    for arm in CONFIGS:
        tried = study.tune(arm)
        rate = min(tried, key=lambda one: tried[one])
        arms[arm] = {"tried": {str(one): loss for one, loss in tried.items()}, "rate": rate, "losses": []}
    for seed in range(seeds):
        for arm in list(CONFIGS)[:: 1 if seed % 2 else -1]:
            arms[arm]["losses"].append(study.run(arm, arms[arm]["rate"], seed))
    for arm, of in arms.items():
        told = mean_interval(of["losses"])
        of["loss"] = {"mean": round(told.mean, 4), "low": round(told.low, 4), "high": round(told.high, 4)}
        runs = pd.DataFrame([study.runs[arm, of["rate"], seed] for seed in range(seeds)])
        of |= runs[[name for name in (*GATES, "cpu_s") if name in runs]].mean().round(4).to_dict()
    found = [paired_difference(arms[a]["losses"], arms[b]["losses"]) for a, b in CONTRASTS]
    adjusted = holm([one.p for one in found]).tolist()
    say = partial(verdict, comparisons=len(found), better="lower", unit="millinats", scale=1000)
    return {
        "start": round(measure(study.base, study.texts.held_out), 4),
        "arms": arms,
        "verdicts": {
            f"{a} against {b}": say(one, p, a, b)
            for one, p, (a, b) in zip(found, adjusted, CONTRASTS, strict=True)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    settings = Settings(given.model)
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    study = Study(given.output.with_suffix(".jsonl"), settings, read_texts(given.data, settings), base)
    result = {
        "machine": machine(packages=("torch", "peft", "transformers")),
        "settings": asdict(settings),
        **summarise(study, given.seeds),
    }
    for pair, found in result["verdicts"].items():
        print(f"{pair}: {found}")
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
