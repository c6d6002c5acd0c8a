"""A step of OptimisticAdagrad beside one of torch's Adagrad, in turns: processor seconds and memory.

    python -m bench.oadagrad --output bench/results/oadagrad.json

100 million parameters in float32, as one tensor and as a hundred; nothing but the step is timed. Adagrad is
`torch.optim.Adagrad(foreach=True)`, and ours is taken with foreach and without, which is torch's default on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

from hapo.optim import OptimisticAdagrad, OptimisticSGD

from .paired import machine
from .turns import Baton, alternate, report, shown

KINDS: dict[str, Any] = {
    "Adagrad": partial(torch.optim.Adagrad, foreach=True),
    "OAdagrad, foreach": partial(OptimisticAdagrad, foreach=True),
    "OAdagrad": partial(OptimisticAdagrad, foreach=False),
    "OSG": partial(OptimisticSGD, foreach=False),
}
LAYOUTS = {"one tensor": [(100_000_000,)], "a hundred": [(1000, 1000)] * 100}


def contend(baton: Baton, *, kind: str, layout: str, steps: int) -> dict[str, float]:
    """A contender: so many steps a turn. It returns the states that it holds per parameter."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in LAYOUTS[layout]]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = KINDS[kind](params, lr=1e-3)
    for _ in range(2):  # the first steps of ours take another path
        optimizer.step()
    while baton.begin():
        for _ in range(steps):
            optimizer.step()
        baton.end()
    numbers = sum(
        x.numel() for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)
    )
    return {"states per parameter": round(numbers / sum(p.numel() for p in params), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "pairs": given.pairs, "steps": given.steps}
    for layout in LAYOUTS:
        contenders = {k: partial(contend, kind=k, layout=layout, steps=given.steps) for k in KINDS}
        turns, ends = alternate(contenders, pairs=given.pairs)
        found = report(turns)
        kept = {pair: ratio for pair, ratio in found["ratios"].items() if pair.endswith("/ Adagrad")}
        result[layout] = {"contenders": found["contenders"], "ratios": kept, "states": ends}
        for pair, ratio in kept.items():
            print(f"{layout}, {pair}: cpu {shown(ratio['cpu_s'])}, peak memory {shown(ratio['peak_mib'])}")
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
