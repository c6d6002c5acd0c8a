"""Semantic entropies of a file's problems under a model, by likelihood and by count, from `hapo curriculum`.

    python -m bench.semantic_entropy --model models/SmolLM2-135M-Instruct --data gsm8k_train.jsonl

The file has the columns question and answer. Answers are short: a model of this size gains nothing by long ones.
With the defaults, 100 problems and 8 samples, about ten minutes of one core. Stopped, it goes on with the same
--work folder. No question is written into the result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from pathlib import Path

import hapo
from hapo.cli import main as run
from hapo.outputs import write_whole
from hapo.tasks.semantic import semantic_entropy

TEMPLATE = "{question}\n\nDo not explain. Write one line of the form: Answer: NUMBER"


def main() -> None:
    """Sample, and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24, help="longest answer")
    parser.add_argument("--work", type=Path, default=Path("runs/semantic_entropy"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/semantic_entropy.json"))
    told = parser.parse_args()
    began, cpu = time.perf_counter(), time.process_time()
    options = {
        "model": told.model, "dataset": told.data, "train_size": told.problems, "eval_size": 50, "chat": "true",
        "prompt_template": TEMPLATE, "samples": told.samples, "max_completion_length": told.tokens,
        "per_device_eval_batch_size": 4 * told.samples, "threads": 1, "use_cpu": "true", "output": told.work,
    }  # fmt: skip
    code = run(["curriculum", *(word for name, value in options.items() for word in (f"--{name}", str(value)))])
    if code:
        raise SystemExit(code)
    problems = []
    for file in sorted((told.work / "samples").iterdir()):
        for one in map(json.loads, file.read_text().splitlines()):
            entropies = {by: semantic_entropy(one["logps"], one["clusters"], by) for by in ("likelihood", "count")}
            kept = {name: one[name] for name in ("answers", "clusters", "logps", "tokens", "truncated", "scores")}
            problems.append({**entropies, **kept})
    cells = [[problem[by] for problem in problems] for by in ("likelihood", "count")]
    result = {
        "hapo": hapo.__version__,
        "options": {**options, "model": Path(told.model).name, "dataset": Path(told.data).name, "output": ""},
        "data_sha256": hashlib.sha256(Path(told.data).read_bytes()).hexdigest(),
        "machine": platform.platform(),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "mean": {by: sum(cell) / len(cell) for by, cell in zip(("likelihood", "count"), cells, strict=True)},
        "most": math.log(told.samples),
        "no_answer": sum(problem["answers"].count(None) for problem in problems),
        "solved": sum(sum(problem["scores"]) for problem in problems) / (len(problems) * told.samples),
        "problems": problems,
    }
    write_whole(told.out, json.dumps(result) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "problems"}, indent=2))


if __name__ == "__main__":
    main()
