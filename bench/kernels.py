"""The kernels on a GPU in units of the time to move their data once: paired and alternating, in one process.

    python -m bench.kernels --output bench/results/kernels.json

Bandwidth is that of a device-to-device copy of the same logits, bytes read and written. Least time: what the
kernel must read and write, at that bandwidth. `scores` and `gradient` stand beside TRL's Triton kernel of the
same two quantities; `temper_` is the temperature rule as the samplers call it, in place.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

from hapo.batch import EntropyStats
from hapo.kernels import scores as kernels
from hapo.methods._options import TemperatureOptions
from hapo.samplers.rule import TemperatureRule, temper_

from .paired import machine, seconds, summary

RULE = TemperatureRule(TemperatureOptions(tau=0.1), EntropyStats(pivot=0.3, sigma=1.0, h_max=2.0, h_min=-8.0))
SHAPES = [(8192, 49_152), (4096, 151_936), (64, 151_936), (256, 151_936)]
"""Positions of a training chunk; rows of a decoding batch."""


def forms(logits: torch.Tensor) -> dict[str, tuple[Callable[[], object], int]]:
    """Each form, and how often it must move the logits: a read is one, a write another."""
    n, vocabulary = logits.shape
    tokens = torch.randint(vocabulary, (n,), device=logits.device)
    a, b = torch.randn(2, n, device=logits.device)
    copy, out = torch.empty_like(logits), torch.empty_like(logits)
    _, entropy, normaliser = kernels.scores(logits, tokens)
    t_base = torch.ones(n, device=logits.device)
    leaf = logits.detach().requires_grad_()
    logp, h = selective_log_softmax_and_entropy(leaf, tokens)
    work = logits.clone()
    return {
        "copy": (lambda: copy.copy_(logits), 2),
        "sum": (lambda: logits.sum(-1), 1),
        "scores": (lambda: kernels.scores(logits, tokens), 1),
        "TRL's scores": (lambda: selective_log_softmax_and_entropy(logits, tokens), 1),
        "gradient": (lambda: kernels.gradient(logits, tokens, normaliser, entropy, a, b, out), 2),
        "TRL's gradient": (lambda: torch.autograd.grad((logp, h), leaf, (a, b), retain_graph=True), 2),
        "temper_": (lambda: temper_(work, RULE, t_base, None), 2),
    }


def measure(n: int, vocabulary: int, dtype: torch.dtype, pairs: int, repeats: int) -> dict[str, object]:
    logits = (3 * torch.randn(n, vocabulary, device="cuda")).to(dtype)
    made = forms(logits)
    least = {name: moves for name, (_, moves) in made.items()}
    times: dict[str, list[float]] = {}
    for pair in range(-2, pairs):  # the first two warm up
        for name, (run, _) in made.items():

            def again(run: Callable[[], object] = run) -> None:
                for _ in range(repeats):
                    run()

            took = seconds(again, "cuda")[0] / repeats
            if pair >= 0:
                times.setdefault(name, []).append(took)
    unit = [took / 2 for took in times["copy"]]
    ours_theirs = {"scores": "TRL's scores", "gradient": "TRL's gradient"}
    return {
        "positions": n,
        "vocabulary": vocabulary,
        "dtype": str(dtype).removeprefix("torch."),
        "TB/s of a copy": round(2 * logits.nbytes / summary(times["copy"])["median"] / 1e12, 2),
        "ms": {name: summary([1e3 * t for t in found]) for name, found in times.items()},
        "over least time": {
            name: summary([t / (least[name] * u) for t, u in zip(found, unit, strict=True)])
            for name, found in times.items()
        },
        "over TRL's": {
            ours: summary([x / y for x, y in zip(times[ours], times[theirs], strict=True)])
            for ours, theirs in ours_theirs.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.manual_seed(0)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for n, vocabulary in SHAPES:
            result = measure(n, vocabulary, dtype, given.pairs, given.repeats)
            results.append(result)
            print(f"\n{n} x {vocabulary} {result['dtype']}, copy {result['TB/s of a copy']} TB/s")
            for name, figure in result["over least time"].items():  # type: ignore[attr-defined]
                against = result["over TRL's"].get(name)  # type: ignore[attr-defined]
                beside = "" if against is None else f"   {against['median']:.2f} of TRL's"
                ms = result["ms"][name]["median"]  # type: ignore[index]
                print(f"  {name:16}{ms:9.4f} ms{figure['median']:7.2f} of the least time{beside}", flush=True)
            torch.cuda.empty_cache()
    given.output.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine("cuda", ("torch", "triton", "trl")), "pairs": given.pairs, "results": results}
    given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
