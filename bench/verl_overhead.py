"""The plug-in's own work in verl, once a rollout batch on the driver and once a micro-batch on an actor.

    python -m bench.verl_overhead --output bench/results/verl_overhead.json

On 512 and on 8192 responses (the paper's rollout batch) of up to 10,240 tokens, one thread. Shares of a step are
in docs/verl_reference.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VERL_USE_EXTERNAL_MODULES": "hapo.verl_cpu"}

import torch
from verl.workers.utils.padding import response_to_nested

import hapo.verl_cpu
from hapo.batch import StepTotals, TokenBatch

from .paired import machine, seconds


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
    method = hapo.method("hapo")
    held = _peak()
    prepared = method.prepare(batch)
    of_prepare = _peak()
    nested = torch.nested.as_nested_tensor([torch.ones(n, dtype=torch.long) for n in length], layout=torch.jagged)
    count = int(mask.sum())
    rows = prepared.rows(slice(0, micro)).replace(totals=StepTotals(responses, count, count))
    logp = (rows.old_logp + 0.1).requires_grad_()

    def median(work: Callable[[], object], wall: bool = True) -> float:
        return round(statistics.median(seconds(work)[wall] for _ in range(repeats)), 3)

    return {
        "responses": responses,
        "tokens": count,
        "prepare, s a rollout batch": median(lambda: method.prepare(batch)),
        "prepare, CPU s a rollout batch": median(lambda: method.prepare(batch), wall=False),
        "peak memory before prepare, GiB": held,
        "peak memory of prepare, GiB": of_prepare,
        "to nested tensors, s a rollout batch": median(
            lambda: [response_to_nested(x, nested) for x in (prepared.mask, prepared.signal)]
        ),
        f"loss, s a micro-batch of {micro}": median(lambda: method.loss(rows.replace(logp=logp))),
        "peak memory of the process, GiB": _peak(),
    }


def _peak() -> float:
    """Of this process so far, libraries and inputs included."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "machine": machine(packages=("torch", "verl")),
        "at scale": [at_scale(512, 5), at_scale(8192, 1)],
    }
    print(json.dumps(result["at scale"], indent=2), flush=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
