"""Small games between a generator and a critic: what optimism and a metric of gradients do for them.

    python -m bench.game ring --output bench/results/game_ring.json
    python -m bench.game digits --output bench/results/game_digits.json
    python -m bench.game plot bench/results/game_*.json --output docs/evidence/game.svg

`ring` is a GAN with the non-saturating loss on eight Gaussians in the plane; `digits` is WGAN-GP on scikit-learn's
8 x 8 digits (`pip install scikit-learn`). Both gradients are taken at the same point before either player moves,
so that all contenders pay one gradient per step. The outcome is the energy distance between generated points and
those that were held out, mean of the last five measurements: lower is better. Each contender's learning rate is
chosen on seeds of its own; the seeds of the comparison are paired: a seed decides weights, batches and noise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from hapo.insight.statistics import MIN_SEEDS, compare_arms, mean_interval
from hapo.optim import OptimisticAdagrad, OptimisticSGD

from .paired import machine

TUNED_ON = (100, 101)
"""Seeds on which the learning rates are chosen, and no others are compared."""

MEASURED = 5
"""Measurements in the last fifth of a run, whose mean is its outcome."""


class OptimisticAdam(torch.optim.Adam):
    """Adam whose step d is followed by d minus the step before (Daskalakis et al., arXiv 1711.00141, Alg. 1)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in params]
        super().step(closure)
        for p, old in zip(params, before, strict=True):
            moved = p - old
            p.add_(moved - self.state[p].get("moved", moved))
            self.state[p]["moved"] = moved


SMALL, LARGE = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
BETAS = (0.5, 0.9)

CONTENDERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[float, ...]]] = {
    "sgd": (torch.optim.SGD, LARGE),
    "adam": (partial(torch.optim.Adam, betas=BETAS), SMALL),
    "adagrad": (torch.optim.Adagrad, LARGE),
    "osg": (OptimisticSGD, LARGE),
    "oadagrad": (partial(OptimisticAdagrad, delta=1.0), LARGE),
    "optimistic adam": (partial(OptimisticAdam, betas=BETAS), SMALL),
}
"""Name -> optimiser, and the learning rates that are tried."""


def layers(*sizes: int) -> nn.Sequential:
    made: list[nn.Module] = []
    for a, b in pairwise(sizes):
        made += [nn.Linear(a, b), nn.LeakyReLU(0.2)]
    return nn.Sequential(*made[:-1])


@dataclass(frozen=True)
class Task:
    """Data, players and losses of a game."""

    steps: int
    batch: int
    noise: int
    generator: tuple[int, ...]
    critic: tuple[int, ...]
    train: Callable[[int], Tensor]
    """Number -> as many points to train on."""
    held_out: Tensor
    losses: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    """Critic, real and generated points -> the loss of the critic, and of the generator."""


def ring() -> Task:
    def draw(n: int) -> Tensor:
        angle = torch.randint(8, (n,)) * (math.pi / 4)
        return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(n, 2)

    def losses(critic: nn.Module, real: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        of_made = critic(made)
        return softplus(-critic(real)).mean() + softplus(of_made).mean(), softplus(-of_made).mean()

    torch.manual_seed(12345)
    return Task(2000, 128, 8, (8, 64, 64, 2), (2, 64, 64, 1), draw, draw(1000), losses)


def digits() -> Task:
    from sklearn.datasets import load_digits

    points = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
    points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))]
    train, held_out = points[:1200], points[1200:]

    def losses(critic: nn.Module, real: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        of_made = critic(made).mean()
        between = torch.lerp(real, made.detach(), torch.rand(len(real), 1)).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        penalty = 10 * (slope.norm(dim=1) - 1).square().mean()
        return of_made - critic(real).mean() + penalty, -of_made

    def draw(n: int) -> Tensor:
        return train[torch.randint(len(train), (n,))]

    return Task(1500, 64, 16, (16, 96, 96, 64), (64, 96, 96, 1), draw, held_out, losses)


TASKS = {"ring": ring, "digits": digits}


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'|, pairs of one point with itself left out; 0 for equal distributions."""

    def within(x: Tensor) -> Tensor:
        return torch.pdist(x).mean()

    return float(2 * torch.cdist(a, b).mean() - within(a) - within(b))


def marks(steps: int) -> list[int]:
    """About thirty numbers of gradients, evenly spaced on a logarithmic scale."""
    return sorted({round(x) for x in np.geomspace(1, steps, 30)})


def play(task: Task, optimizer: Callable[..., torch.optim.Optimizer], rate: float, seed: int) -> dict[str, Any]:
    """One run: its outcome, and the norms of its cumulative gradients at `marks`.

    `mean` is over the coordinates of both players, of the root of the sum of squared gradients; `largest` is that
    of the coordinate where it is largest in the end.
    """
    torch.manual_seed(seed)
    generator, critic = layers(*task.generator), layers(*task.critic)
    of_critic, of_generator = list(critic.parameters()), list(generator.parameters())
    params = [*of_critic, *of_generator]
    steps = optimizer(params, lr=rate)
    total = torch.zeros(sum(p.numel() for p in params))
    noise = torch.randn(len(task.held_out), task.noise, generator=torch.Generator().manual_seed(seed))

    def measure() -> float:
        with torch.no_grad():
            return energy_distance(generator(noise), task.held_out)

    start, measured, cumulative = measure(), [], []
    at, last = set(marks(task.steps)), {task.steps - i * task.steps // 20 for i in range(MEASURED)}
    for k in range(1, task.steps + 1):
        made = generator(torch.randn(task.batch, task.noise))
        loss, its = task.losses(critic, task.train(task.batch), made)
        gradients = torch.autograd.grad(loss, of_critic, retain_graph=True)
        gradients += torch.autograd.grad(its, of_generator)
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        total.addcmul_(flat, flat)
        steps.step()
        if k in at:
            cumulative.append(total.sqrt())
        if k in last:
            measured.append(measure())
    norms = torch.stack(cumulative)
    largest = norms[:, norms[-1].argmax()]
    outcome = float(np.mean(measured))
    diverged = not math.isfinite(outcome)
    return {
        "outcome": start if diverged else outcome,  # one would keep the generator of the start
        "diverged": diverged,
        "start": start,
        **{
            name: [round(x, 5) for x in curve.tolist()]
            for name, curve in (("mean", norms.mean(1)), ("largest", largest))
        },
    }


def exponent(curve: list[float], at: list[int]) -> float:
    """Alpha: the slope of log |g_{1:k}| in log k, over the last nine tenths of the run."""
    x, y = np.log(at), np.log(curve)
    late = np.asarray(at) >= at[-1] / 10
    return float(np.polyfit(x[late], y[late], 1)[0])


def tune(name: str, task: Task) -> Iterator[tuple[float, float]]:
    """Each learning rate with its mean outcome on the seeds for tuning."""
    optimizer, rates = CONTENDERS[name]
    for rate in rates:
        runs = [play(task, optimizer, rate, seed) for seed in TUNED_ON]
        yield rate, float(np.mean([math.inf if run["diverged"] else run["outcome"] for run in runs]))


def compete(task: Task, seeds: int) -> dict[str, Any]:
    """All contenders at their best learning rates on the same seeds."""
    at, arms, outcomes = marks(task.steps), {}, {}
    assert seeds >= MIN_SEEDS
    for name, (optimizer, _) in CONTENDERS.items():
        began = time.process_time()
        tried = dict(tune(name, task))
        rate = min(tried, key=lambda one: tried[one])
        runs = [play(task, optimizer, rate, seed) for seed in range(seeds)]
        outcomes[name] = [run["outcome"] for run in runs]
        whole = [run for run in runs if not run["diverged"]]
        alphas = {curve: [exponent(run[curve], at) for run in whole] for curve in ("mean", "largest")}
        arms[name] = {
            "tried": {str(one): round(found, 5) if math.isfinite(found) else None for one, found in tried.items()},
            "rate": rate,
            "outcomes": [round(x, 5) for x in outcomes[name]],
            "diverged": len(runs) - len(whole),
            "outcome": told(outcomes[name]),
            "alpha": {curve: told(values) for curve, values in alphas.items()},
            "curves": {c: np.mean([run[c] for run in whole], 0).round(4).tolist() for c in alphas},
            "cpu_s": round(time.process_time() - began, 1),
        }
        print(
            f"{name}: rate {rate}, {arms[name]['outcome']}, alpha {arms[name]['alpha']}",
            file=sys.stderr,
            flush=True,
        )
    table = pd.DataFrame(outcomes)
    compared = compare_arms(table, "oadagrad", better="lower", unit="thousandths", scale=1000)
    return {"at": at, "arms": arms, "verdicts": compared["verdict"].to_dict()}


def told(values: list[float]) -> dict[str, float] | None:
    """Mean and 95 % interval over seeds; None for too few of them."""
    if len(values) < MIN_SEEDS:
        return None
    found = mean_interval(values)
    return {"mean": round(found.mean, 5), "low": round(found.low, 5), "high": round(found.high, 5)}


def plot(files: list[Path], output: Path) -> None:
    """The cumulative gradients over steps, both scales logarithmic, one panel per task."""
    import altair as alt

    from hapo.insight.figures import OKABE_ITO

    rows = []
    for file in files:
        result = json.loads(file.read_text())
        for name, arm in result["arms"].items():
            rows += [
                {"task": result["task"], "optimiser": name, "gradients": k, "cumulative norm": value}
                for k, value in zip(result["at"], arm["curves"]["mean"], strict=True)
            ]
    chart = (
        alt.Chart(pd.DataFrame(rows), width=300, height=240)
        .mark_line()
        .encode(
            x=alt.X("gradients:Q").scale(type="log"),
            y=alt.Y("cumulative norm:Q").scale(type="log").title("mean |g₁:k| of a coordinate"),
            color=alt.Color("optimiser:N").sort(list(CONTENDERS)).scale(range=OKABE_ITO["light"]),
        )
        .facet(column=alt.Column("task:N").title(None))
        .resolve_scale(y="independent")
    )
    chart.save(str(output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*TASKS, "plot"))
    parser.add_argument("files", type=Path, nargs="*", help="results to plot")
    parser.add_argument("--seeds", type=int, default=7)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    if given.what == "plot":
        plot(given.files, given.output)
        return
    task = TASKS[given.what]()
    result = {"machine": machine(), "task": given.what, "steps": task.steps, "tuned_on": TUNED_ON}
    result |= compete(task, given.seeds)
    for verdict in result["verdicts"].values():
        print(verdict)
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
