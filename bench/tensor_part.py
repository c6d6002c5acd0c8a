"""What comes after scoring: prepare, loss and backward on log-probs and entropies, HAPO and verl's GRPO in turns.

    python -m bench.tensor_part --output bench/results/tensor_part.json

In the environment of `make test-parity` (verl's functions). 512 responses of up to 10,240 tokens, 16 a prompt, and
the same with 32 responses; lengths between an eighth and the whole, ratios and entropies as in training:
log-ratios of standard deviation 0.1, log-entropies normal. One optimiser step. A unit is the time to read the
inputs once: the sums of the log-probs (old and current), the entropies and the mask.

verl: `compute_grpo_outcome_advantage` and `compute_policy_loss_vanilla` (token mean, clip 0.2 to 0.28), which
read no entropies. `plain`: the same loss in a few lines of torch. Peak memory is above what the inputs take.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor

import hapo

from .paired import machine
from .turns import Baton, alternate, report, shown

WIDTH, GROUP = 10_240, 16
SIZES = {"whole": 512, "sixteenth": 32}


def inputs(responses: int, device: str = "cpu") -> hapo.TokenBatch:
    """A rollout batch; logp needs a gradient."""
    generator = torch.Generator().manual_seed(0)
    length = torch.randint(WIDTH // 8, WIDTH + 1, (responses,), generator=generator)
    shape = (responses, WIDTH)
    old = -torch.rand(shape, generator=generator).square()
    batch = hapo.TokenBatch(
        mask=torch.arange(WIDTH) < length.unsqueeze(1),
        old_logp=old,
        logp=old + 0.1 * torch.randn(shape, generator=generator),
        old_entropy=torch.randn(shape, generator=generator).sub_(1.0).mul_(1.5).exp_(),
        reward=torch.randint(0, 2, (responses,), generator=generator).float(),
        group=torch.arange(responses) // GROUP,
    )
    fields = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    batch = batch.replace(**fields)
    assert batch.logp is not None
    return batch.replace(logp=batch.logp.requires_grad_())


def read(batch: hapo.TokenBatch) -> Callable[[], object]:
    """One pass over everything."""
    assert batch.logp is not None and batch.old_entropy is not None
    floats = [batch.logp.detach(), batch.old_logp, batch.old_entropy]
    # The bytes of the mask are summed as numbers of four.
    return lambda: [x.sum() for x in (*floats, batch.mask.view(torch.float32))]


def ours(name: str, batch: hapo.TokenBatch) -> Callable[[], object]:
    method = hapo.method(name)
    return lambda: method.loss(method.prepare(batch)).loss.backward()


def plain(batch: hapo.TokenBatch) -> Callable[[], object]:
    """GRPO's advantage and DAPO's loss, each on whole tensors."""
    assert batch.logp is not None
    logp, old, mask = batch.logp, batch.old_logp, batch.mask.float()

    def run() -> None:
        reward = batch.reward.view(-1, GROUP)
        advantage = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)).view(-1, 1)
        ratio = (logp - old).exp()
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        ((loss * mask).sum() / mask.sum()).backward()

    return run


def verl(batch: hapo.TokenBatch) -> Callable[[], object]:
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, compute_policy_loss_vanilla
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp", rollout_n=GROUP, clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28,
        clip_ratio_c=10.0, ppo_micro_batch_size_per_gpu=1,
    )  # fmt: skip
    config.global_batch_info.update(dp_size=1, batch_num_tokens=None, global_batch_size=None)
    mask = batch.mask.float()
    at_the_end = torch.zeros_like(mask)
    at_the_end[:, 0] = batch.reward  # it sums them over the response
    index = batch.group.cpu().numpy().astype(str).astype(object)

    def run() -> None:
        advantage, _ = compute_grpo_outcome_advantage(at_the_end, mask, np.asarray(index))
        loss, _ = compute_policy_loss_vanilla(
            batch.old_logp, batch.logp, advantage, mask, loss_agg_mode="token-mean", config=config
        )
        loss.backward()

    return run


WORK: dict[str, Callable[[hapo.TokenBatch], Callable[[], object]]] = {
    "read the inputs once": read,
    "hapo": partial(ours, "hapo"),
    "dapo": partial(ours, "dapo"),
    "verl grpo + vanilla": verl,
    "plain torch": plain,
}


def contend(baton: Baton, *, work: str, responses: int, repeats: int, device: str) -> None:
    """A contender: `repeats` runs a turn."""
    batch = inputs(responses, device)
    run = WORK[work](batch)
    assert batch.logp is not None
    while baton.begin():
        for _ in range(repeats):
            batch.logp.grad = None
            run()
        baton.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=3, help="runs a turn; sixteen times as many of the small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=WORK)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(given.device), "settings": vars(given) | {"output": None}}
    for size, responses in SIZES.items():
        repeats = given.repeats * SIZES["whole"] // responses
        contenders = {
            work: partial(contend, work=work, responses=responses, repeats=repeats, device=given.device)
            for work in given.work
        }
        turns, _ = alternate(contenders, pairs=given.pairs, device=given.device)
        result[size] = {"responses": responses, "repeats": repeats, **report(turns)}
    result["exponent of growth"] = {
        work: round(math.log(_each(result, "whole", work) / _each(result, "sixteenth", work), 16), 4)
        for work in given.work
    }
    print(table(result))
    given.output.write_text(json.dumps(result, indent=1) + "\n")


def _each(result: dict[str, Any], size: str, work: str) -> float:
    """Processor seconds of one run."""
    return result[size]["contenders"][work]["cpu_s"]["median"] / result[size]["repeats"]


def table(result: dict[str, Any]) -> str:
    lines = [f"{'512 x 10,240':24}{'ms':>9}{'reads':>22}{'/ verl':>22}{'MiB':>9}{'growth':>9}"]
    whole = result["whole"]
    for work, figures in whole["contenders"].items():
        line = f"{work:24}{1e3 * _each(result, 'whole', work):9.1f}"
        for other in ("read the inputs once", "verl grpo + vanilla"):
            ratio = whole["ratios"].get(f"{work} / {other}")
            line += f"{shown(ratio['cpu_s']) if ratio else '':>22}"
        grown = figures["grown_mib"]["median"]
        lines.append(line + f"{grown:9.0f}{result['exponent of growth'][work]:9.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
