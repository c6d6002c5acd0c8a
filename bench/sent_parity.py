"""The loss of SENT's authors and ours on random batches, with a boolean mask and with theirs of whole numbers.

    git clone https://github.com/zldscr0/SENT CLONE
    python -m bench.sent_parity CLONE

Their functions are taken out of the clone at the commit that was read and run as they are. Printed are the largest
differences over twelve batches: of the loss, and of its gradient relative to the largest entry.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import hapo

COMMIT = "2a7c40fa77ea3ce882534a30a1029db06d561825"
LOSS = "compute_policy_loss_low_entropy_kl_cov_v2"
ROWS, LENGTH, SEEDS = 16, 20, range(12)
Batch = dict[str, Tensor]


def functions(clone: Path, file: str, names: set[str], known: dict[str, Any]) -> dict[str, Any]:
    """These functions of their file, without decorators, with `known` as their globals."""
    told = ["git", "-C", str(clone), "show", f"{COMMIT}:{file}"]
    source = subprocess.run(told, check=True, capture_output=True, text=True).stdout
    found = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name in names]
    for node in found:
        node.decorator_list = []
    exec(compile(ast.Module(list(found), []), file, "exec"), known)
    return known


def random_batch(seed: int, dtype: torch.dtype) -> Batch:
    """Responses of 1 to LENGTH tokens, the first of full length; one advantage on all tokens of a response."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LENGTH + 1, (ROWS,), generator=generator).index_fill(0, torch.tensor(0), LENGTH)

    def normal(scale: float) -> Tensor:
        return (scale * torch.randn(ROWS, LENGTH, generator=generator, dtype=torch.float64)).to(dtype)

    old, mask = -normal(1.0).abs() - 0.01, torch.arange(LENGTH) < lengths.unsqueeze(1)
    tensors = {"mask": mask, "old": old, "new": old + normal(0.4), "ref": old + normal(0.4)}
    return tensors | {"entropy": normal(1.0).abs(), "advantage": normal(1.0)[:, :1].expand(ROWS, LENGTH)}


def theirs(code: dict[str, Any], batch: Batch, mask: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient of their code, with 0.001 k3 to the reference as in their scripts."""
    logp = batch["new"].clone().requires_grad_()
    config = SimpleNamespace(policy_loss=SimpleNamespace(kl_cov_ratio=ratio, ppo_kl_coef=0.1))
    given = (batch["old"], logp, batch["advantage"], mask, batch["entropy"])
    k3 = code["kl_penalty"](logp, batch["ref"], "low_var_kl")
    loss = code[LOSS](*given, "token-mean", config)[0] + 0.001 * code["agg_loss"](k3, mask, "token-mean")
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


def ours(batch: Batch, ratio: float, signal: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Loss and gradient of ours; with weights of the penalty other than its own where they are given."""
    logp, reward = batch["new"].clone().requires_grad_(), torch.zeros(ROWS)
    method = hapo.method("sent", variant="release", high_cov_ratio=ratio)
    made = hapo.TokenBatch(
        mask=batch["mask"], old_logp=batch["old"], logp=logp, ref_logp=batch["ref"], entropy=batch["entropy"],
        old_entropy=batch["entropy"], reward=reward, group=torch.arange(ROWS) // 4,
    )  # fmt: skip
    step = method.step(method.prepare(made).replace(advantage=batch["advantage"]))
    loss = method.loss(step if signal is None else step.replace(signal=signal)).loss
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


def faulty_weights(batch: Batch, ratio: float) -> tuple[Tensor, int]:
    """The weights where advantages and log-probs are indexed by the mask as whole numbers; and of how many
    different advantages their covariances are made."""
    mask = batch["mask"]
    k = max(1, int(int(mask.sum()) * 0.8))
    low = batch["entropy"][mask].topk(k, largest=False).indices
    of_advantage, of_logp = (batch[name][mask.long()].reshape(-1)[low] for name in ("advantage", "new"))
    cov = (of_advantage - of_advantage.mean()) * (of_logp - of_logp.mean())
    count, places = max(1, int(k * ratio)), mask.reshape(-1).nonzero().squeeze(1)[low]
    weights = torch.zeros(mask.numel(), dtype=cov.dtype)
    weights[places[cov.topk(count).indices]] = 0.2
    weights[places[cov.topk(count, largest=False).indices]] = 0.05
    return weights.view_as(mask), len(of_advantage.unique())


def main() -> None:
    """Print both parities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    clone = parser.parse_args().clone
    mean = functions(clone, "verl/utils/torch_functional.py", {"masked_mean"}, {"torch": torch})
    known = {"torch": torch, "verl_F": SimpleNamespace(masked_mean=mean["masked_mean"])}
    code = functions(clone, "verl/trainer/ppo/core_algos.py", {LOSS, "agg_loss", "kl_penalty"}, known)
    for dtype in (torch.float64, torch.float32):
        for ratio in (0.0002, 0.1):
            worst: dict[str, tuple[float, float]] = {}
            advantages = set()
            for seed in SEEDS:
                batch = random_batch(seed, dtype)
                weights, distinct = faulty_weights(batch, ratio)
                advantages.add(distinct)
                own, whole = ours(batch, ratio), theirs(code, batch, batch["mask"].long(), ratio)
                pairs = {
                    "boolean mask": (theirs(code, batch, batch["mask"], ratio), own),
                    "whole numbers": (whole, own),
                    "whole numbers, ours with the weights of the fault": (whole, ours(batch, ratio, weights)),
                }
                for name, ((loss, grad), (our_loss, our_grad)) in pairs.items():
                    found = (
                        float((loss - our_loss).abs()),
                        float((grad - our_grad).abs().max() / our_grad.abs().max()),
                    )
                    worst[name] = tuple(map(max, found, worst.get(name, (0.0, 0.0))))
            print(f"{dtype}, high_cov_ratio {ratio}; advantages in the covariances of the fault: {advantages}")
            for name, (loss, grad) in worst.items():
                print(f"  {name}: loss {loss:.0e}, gradient {grad:.0e}")


if __name__ == "__main__":
    main()
