"""A run of seconds: the demo, cut down, with a reward that earns mixed groups and can act up on demand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

REWARD = '''
import os, signal, time

signals = int(os.environ.get("ACT", "0").replace("raise", "0"))

def parity(prompts, completions, trainer_state=None, **columns):
    """Training alone knows the state: $ACT says what happens in the rollout after optimiser step 2."""
    global signals
    if trainer_state is not None and trainer_state.global_step == 2:
        if os.environ.get("ACT") == "raise":
            raise KeyError("gold")
        while signals:
            signals -= 1
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
    return [float(sum(int(c) for c in text if c.isdigit()) % 2) for text in completions]
'''

OPTIONS = {
    "train_size": 32,
    "eval_size": 6,
    "num_generations": 4,
    "max_num_gen_batches": 2,
    "per_device_train_batch_size": 8,
    "steps_per_generation": 2,
    "max_completion_length": 12,
    "max_steps": 5,
    "save_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "report": False,
}


def flags(**options: Any) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def train(folder: Path, **options: Any) -> list[str]:
    """Arguments of `hapo train` for a small run in the folder."""
    reward = folder.parent / "reward.py"
    reward.write_text(REWARD)
    return ["train", *flags(**{**OPTIONS, "rewards": f"{reward}:parity", "output_dir": folder, **options})]


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """What was measured along a run."""
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def accuracy(measured: dict[str, Any]) -> dict[str, Any]:
    """The estimate in it."""
    return {k: measured[k] for k in ("mean", "low", "high", "problems", "samples", "binary")}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What a run logged at each step, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in m.items() if k not in ("wall_seconds", "step_time") and not k.startswith("time/")}
        for m in lines
        if "loss" in m
    ]
