"""Cost of the adaptive temperature in reads of the logits: paired and alternating, in one process.

    python -m bench.temperature --output bench/results/temperature_cpu.json

A pair times one read of the logits (their sum) and then one form; its ratio is reported, as median and quartiles
over the pairs: in processor seconds on CPU, with wall seconds beside; between two events on CUDA.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from hapo.batch import EntropyStats
from hapo.methods._options import TemperatureOptions
from hapo.parts.entropy import entropy_from_logits
from hapo.samplers.rule import TemperatureRule, temper_

from .paired import machine, seconds, summary

RULE = TemperatureRule(TemperatureOptions(tau=0.1), EntropyStats(pivot=0.3, sigma=1.0, h_max=2.0, h_min=-8.0))


def naive(logits: Tensor, t_base: Tensor) -> Tensor:
    """The entropy as it is written most often."""
    logp = (logits / t_base.unsqueeze(1)).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def measure(rows: int, vocabulary: int, pairs: int, device: str, dtype: torch.dtype) -> dict[str, object]:
    start = (3 * torch.randn(rows, vocabulary)).to(device, dtype)
    logits = start.clone()
    t_base = torch.full((rows,), 0.7, device=device)
    half = torch.arange(0, rows, 2, device=device)

    forms = {
        "one read": logits.sum,
        "softmax": lambda: logits.softmax(-1),
        "naive entropy": lambda: naive(logits, t_base),
        "entropy_from_logits": lambda: entropy_from_logits(logits, t_base),
        "temper_, all rows": lambda: temper_(logits, RULE, t_base, None),
        "temper_, half of the rows": lambda: temper_(logits, RULE, t_base, half),
    }
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    reads = []
    for pair in range(-2, pairs):  # the first two warm up
        for name, run in forms.items():
            logits.copy_(start)  # temper_ changed them
            read, took = seconds(logits.sum, device), seconds(run, device)
            if pair >= 0:
                reads.append(read[1])
                ratios[name].append((took[0] / read[0], took[1] / read[1]))
    return {
        "rows": rows,
        "vocabulary": vocabulary,
        "dtype": str(dtype).removeprefix("torch."),
        "read_ms": summary([1e3 * s for s in reads]),
        "reads": {name: summary([cpu for cpu, _ in both]) for name, both in ratios.items()},
        "reads_wall": {name: summary([wall for _, wall in both]) for name, both in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[49_152, 151_936])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: with HAPO_TRITON=1 the Triton kernel"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    begin = machine(given.device)
    results = [
        measure(rows, vocabulary, given.pairs, given.device, getattr(torch, given.dtype))
        for vocabulary in given.vocabulary
        for rows in given.rows
    ]
    end = machine(given.device)
    for result in results:
        print(f"\n{result['rows']} x {result['vocabulary']}, one read {result['read_ms']['median']:.2f} ms")
        for name, ratio in result["reads"].items():
            print(f"  {name:27}{ratio['median']:7.2f}  [{ratio['low']:.2f}, {ratio['high']:.2f}] reads")
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": {**begin, "load_after": end["load"]}, "pairs": given.pairs, "results": results}
        given.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
