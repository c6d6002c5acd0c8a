"""What the plug-in adds to a step of verl on CPU: the stock GRPO trainer and hapo's, in turns.

    python -m bench.verl_overhead --pairs 7 --output bench/results/verl_overhead.json

Each is a run of verl's main_ppo: the same random model, prompts and batch sizes, at T_base. A pair is one run of
each, in turns first and second. Of each run: medians over its steps, but the first, of its timers. Before that, in
this process: the plug-in's work on 512 and on 8192 responses (the paper's batch) of up to 10,240 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VERL_USE_EXTERNAL_MODULES": "hapo.verl_cpu"}

import torch
from verl.workers.utils.padding import response_to_nested

import hapo.verl_cpu
from hapo.batch import StepTotals, TokenBatch
from tests_verl.inputs import make_inputs
from tests_verl.launch import ACTOR, ROLLOUT, launch

from .paired import machine, seconds, summary

STEPS = 12
SAME = (
    "data.train_batch_size=8",
    "data.max_response_length=64",
    f"{ACTOR}.ppo_mini_batch_size=2",
    f"{ACTOR}.ppo_epochs=1",
    f"{ACTOR}.ppo_micro_batch_size_per_gpu=8",
    f"{ACTOR}.optim.lr=1e-5",
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=16",
    f"{ROLLOUT}.n=8",
    "trainer.logger=[file]",
    "trainer.save_freq=-1",
    f"trainer.total_training_steps={STEPS}",
    "+hapo.record_tokens_every=0",
)
CONTENDERS = {
    "stock": (
        "trainer.v1.trainer_mode=sync",
        "algorithm.adv_estimator=grpo",
        f"{ACTOR}.policy_loss.loss_mode=vanilla",
    ),
    "hapo": ("+hapo.method=hapo", "+hapo.options.components=BCD"),
}
TIMERS = ("step", "gen", "old_log_prob", "adv", "update_actor")


def timers(inputs: Path, folder: Path, contender: str) -> dict[str, float]:
    """Medians over the steps of one run, seconds."""
    folder.mkdir()
    log = folder / "metrics.jsonl"
    os.environ["VERL_FILE_LOGGER_PATH"] = str(log)
    launch(inputs, folder, *SAME, *CONTENDERS[contender]).wait()
    steps = [json.loads(line)["data"] for line in log.read_text().splitlines()][1:]
    return {name: statistics.median(step[f"timing_s/{name}"] for step in steps) for name in TIMERS}


def at_scale(responses: int, repeats: int, most: int = 10_240, group: int = 16, micro: int = 16) -> dict[str, Any]:
    """Seconds on one core of what the plug-in does once a rollout batch, and once a micro-batch."""
    generator = torch.Generator().manual_seed(0)
    length = torch.randint(most // 8, most + 1, (responses,), generator=generator)
    mask = torch.arange(most) < length.unsqueeze(1)
    batch = TokenBatch(
        mask=mask,
        old_logp=-torch.rand(responses, most, generator=generator),
        old_entropy=2 * torch.rand(responses, most, generator=generator),
        reward=torch.randint(0, 2, (responses,), generator=generator).float(),
        group=torch.arange(responses) // group,
    )
    nested = torch.nested.as_nested_tensor([torch.ones(n, dtype=torch.long) for n in length], layout=torch.jagged)
    method = hapo.method("hapo")
    prepared = method.prepare(batch)
    count = int(mask.sum())
    rows = prepared.rows(slice(0, micro)).replace(totals=StepTotals(responses, count, count))
    logp = (rows.old_logp + 0.1).requires_grad_()

    def wall(work: Callable[[], object]) -> float:
        return round(statistics.median(seconds(work)[1] for _ in range(repeats)), 3)

    return {
        "responses": responses,
        "tokens": count,
        "prepare, s a rollout batch": wall(lambda: method.prepare(batch)),
        "to nested tensors, s a rollout batch": wall(
            lambda: [response_to_nested(x, nested) for x in (prepared.mask, prepared.signal)]
        ),
        f"loss, s a micro-batch of {micro}": wall(lambda: method.loss(rows.replace(logp=logp))),
        "peak memory of the process, GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "machine": machine(packages=("torch", "verl")),
        "at scale": [at_scale(512, 5), at_scale(8192, 1)],
    }
    print(json.dumps(result["at scale"], indent=2), flush=True)
    pairs: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name) / "inputs"
        inputs.mkdir()
        make_inputs(inputs, width=256, layers=5, sharpness=1.0)
        for pair in range(args.pairs):
            order = list(CONTENDERS)[:: 1 if pair % 2 else -1]
            pairs.append({who: timers(inputs, Path(name) / f"{pair}-{who}", who) for who in order})
            print(json.dumps(pairs[-1]), flush=True)
            if pair:
                added = {
                    timer: [100 * (p["hapo"][timer] - p["stock"][timer]) / p["stock"]["step"] for p in pairs]
                    for timer in TIMERS
                }
                result["added, % of a stock step"] = {timer: summary(found) for timer, found in added.items()}
            args.output.write_text(json.dumps({**result, "pairs": pairs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
