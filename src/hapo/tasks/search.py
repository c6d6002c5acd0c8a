"""Where on the simplex to try next: a Gaussian process with log noisy expected improvement.

A point is K weights w >= 0 with sum(w) = 1; its value is what a trial of it measured, with noise; more is better.
The first trials are the vertices, each weight alone, then a seeded design that fills the simplex evenly. After
them the point of a trial is

    argmax_w log E[ max(f(w) - max_j f(w_j), 0) ],   f the Gaussian process given all trials, w_j their points,

where the expectation is over f at w and at all w_j together, so that a lucky measurement is not taken for the best
value (log noisy expected improvement; Ament et al. 2023, arXiv 2310.20708). The process and the acquisition are
botorch's, with its default kernel and priors; the constraint is an equality in its optimiser. Where the standard
errors of the measurements are known they are the process's noise: its own guess, which expects little, would bend
the surface to every lucky trial.

A trial that failed counts with the worst value seen, and what the process proposes is never within `APART` of it.
What is proposed is a function of the trials so far and the seed alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

APART = 0.02
"""Least distance (Euclidean) of a proposal to a trial that failed."""

DIGITS = 4
"""Decimals of a weight: what lies nearer is the same to a training run."""

SAMPLES = 256
"""Draws of the process at the points of all trials, in the expectation."""

SPREAD, STARTS = 256, 4
"""Points over the whole simplex, and how many of them, the best ones, the optimiser starts from."""


@dataclass(frozen=True)
class Trial:
    """A point that was tried, and what came of it."""

    weights: tuple[float, ...]
    value: float | None
    """None where the trial failed."""
    error: float | None = None
    """Standard error of the value; None where it is unknown."""


def on_simplex(u: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """Points w_k = -ln(u_k) / sum_j -ln(u_j), uniform on the simplex where u is uniform on the cube (0, 1)^K.

    At u = 0 and u = 1, which generators do return, this is infinite or 0 / 0: the nearest number inside stands in.
    """
    kind = torch.finfo(torch.float64)
    spacing = -u.double().clamp(kind.tiny, 1 - kind.eps).log()
    return spacing / spacing.sum(1, keepdim=True)


def log_expected_improvement(
    mean: Float[Tensor, " N"], deviation: Float[Tensor, " N"], best: float
) -> Float[Tensor, " N"]:
    """log E[max(f - best, 0)] of f ~ N(mean, deviation^2): the closed form without noise, float64.

    logEI = log(sd) + log h(u), u = (mean - best) / sd, h(u) = npdf(u) + u ncdf(u) (arXiv 2504.16272). Below
    u = -1 h is npdf(u) (1 + u ncdf(u) / npdf(u)), the ratio by erfcx; below -100 its expansion in 1 / u^2. The
    search itself takes the noisy form.

    Raises:
        ValueError: a deviation that is not above 0.
    """
    if not bool((deviation > 0).all()):
        raise ValueError(f"the deviation must be above 0, got {deviation.tolist()}")
    sd = deviation.double()
    u = (mean.double() - best) / sd
    log_pdf = -0.5 * u**2 - 0.5 * math.log(2 * math.pi)
    high = (log_pdf.exp() + u * torch.special.ndtr(u)).log()
    middle = -u.clamp(-100, -1)
    ratio = math.sqrt(math.pi / 2) * torch.special.erfcx(middle / math.sqrt(2))
    far = u.clamp(max=-100)
    expansion = -2 * (-far).log() + torch.log1p(-3 / far**2 + 15 / far**4)
    low = log_pdf + torch.where(u < -100, expansion, torch.log1p(-middle * ratio))
    return sd.log() + torch.where(u < -1, low, high)


def design(channels: int, size: int, seed: int) -> list[tuple[float, ...]]:
    """The first trials: the K vertices, then scrambled Sobol points; of a larger size, more of these."""
    vertices = [tuple(float(i == k) for i in range(channels)) for k in range(channels)]
    if size <= channels:
        return vertices[:size]
    sobol = torch.quasirandom.SobolEngine(channels, scramble=True, seed=seed)
    return [*vertices, *map(_rounded, on_simplex(sobol.draw(size - channels, dtype=torch.float64)))]


def propose(trials: Sequence[Trial], channels: int, initial: int, seed: int) -> tuple[float, ...]:
    """The weights of the next trial.

    Args:
        trials: all so far, in their order.
        channels: K, at least 2.
        initial: trials of the design, the K vertices among them.
        seed: of the design and of the acquisition.

    Raises:
        ValueError: fewer than two channels; `initial` is less than K; all trials failed, at least K of them.
    """
    if channels < 2:
        raise ValueError(f"{channels} channel leaves nothing to search: name two at least")
    if initial < channels:
        raise ValueError(f"the design must hold the {channels} vertices: set initial to {channels} at least")
    if len(trials) >= channels and all(trial.value is None for trial in trials):
        raise ValueError(f"all {len(trials)} trials failed: there is nothing to go by")
    if len(trials) < initial:
        return design(channels, initial, seed)[len(trials)]
    return GaussianProcess(trials).propose(seed + len(trials))


class GaussianProcess:
    """The Gaussian process given some trials.

    Args:
        trials: with one that did not fail at least. The noise is fitted unless each that did not has an error; a
            failed one then has the largest of theirs.

    Raises:
        ValueError: none has a value, a value is not finite, or an error is not above 0.
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        values = [trial.value for trial in trials if trial.value is not None]
        if not values or not all(map(math.isfinite, values)):
            raise ValueError(f"the values of trials must be finite, one at least; got {[t.value for t in trials]}")
        errors = [trial.error for trial in trials if trial.value is not None and trial.error is not None]
        if not all(0 < error < math.inf for error in errors):
            raise ValueError(f"the standard errors of trials must be above 0 and finite; got {errors}")
        self.trials = list(trials)
        self._points = torch.tensor([trial.weights for trial in trials], dtype=torch.float64)
        self._failed = torch.tensor([trial.value is None for trial in trials])
        observed = [min(values) if trial.value is None else trial.value for trial in trials]
        self._values = torch.tensor(observed, dtype=torch.float64)[:, None]
        self._noise: Tensor | None = None
        if len(errors) == len(values):
            known = [max(errors) if trial.value is None else trial.error for trial in trials]
            self._noise = torch.tensor(known, dtype=torch.float64)[:, None] ** 2

    def posterior(self, points: Float[Tensor, "N K"]) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Mean and standard deviation of the process at points, without the noise of a measurement."""
        with _quiet(), torch.no_grad():
            found = self._model.posterior(points.double())
            return found.mean.squeeze(1), found.variance.clamp(min=0).sqrt().squeeze(1)

    @cached_property
    def best(self) -> int:
        """Which trial has the highest mean under the process, of those that did not fail."""
        mean, _ = self.posterior(self._points)
        return int(mean.masked_fill(self._failed, -math.inf).argmax())

    def propose(self, seed: int) -> tuple[float, ...]:
        """The weights with the highest log noisy expected improvement that are no failed trial's."""
        channels, botorch = self._points.shape[1], _botorch()
        with _quiet(), torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            acquisition = botorch.acquisition.qLogNoisyExpectedImprovement(
                self._model,
                self._points,
                sampler=botorch.sampling.SobolQMCNormalSampler(torch.Size([SAMPLES]), seed=seed),
                prune_baseline=True,
            )
            sobol = torch.quasirandom.SobolEngine(channels, scramble=True, seed=seed)
            spread = on_simplex(sobol.draw(SPREAD, dtype=torch.float64))
            spread = spread[self._apart(spread)]
            with torch.no_grad():
                best = acquisition(spread[:, None]).topk(STARTS).indices
            found, _ = botorch.optim.optimize_acqf(
                acquisition,
                torch.tensor([[0.0] * channels, [1.0] * channels], dtype=torch.float64),
                q=1,
                num_restarts=STARTS,
                batch_initial_conditions=spread[best][:, None],
                equality_constraints=[(torch.arange(channels), torch.ones(channels, dtype=torch.float64), 1.0)],
            )
        return _rounded(found[0] if self._apart(found).item() else spread[best[0]])

    def _apart(self, points: Float[Tensor, "N K"]) -> Bool[Tensor, " N"]:
        """Which points are far from all failed trials, also when they are rounded."""
        distances = torch.cdist(points, self._points[self._failed])
        return (distances >= APART + 10.0 ** (1 - DIGITS)).all(1)

    @cached_property
    def _model(self) -> Any:
        botorch = _botorch()
        from gpytorch.mlls import ExactMarginalLogLikelihood

        with _quiet(), torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            with botorch.settings.validate_input_scaling(False):  # equal values are no fault
                model = botorch.models.SingleTaskGP(self._points, self._values, self._noise)
            botorch.fit.fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        return model


def _botorch() -> Any:
    """The library, without the warning that its import raises about its own code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        try:
            import botorch
            import botorch.acquisition
        except ModuleNotFoundError as error:
            raise ImportError(f"{error}; the search needs it: pip install 'hapo[shape]'") from error
    return botorch


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' words on the rounding that they mend themselves."""
    _botorch()
    from linear_operator.utils.warnings import NumericalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        yield


def _rounded(point: Float[Tensor, " K"]) -> tuple[float, ...]:
    """Weights of `DIGITS` decimals, none below 0, that add up to 1: the largest takes the rest."""
    weights = [round(max(0.0, w), DIGITS) for w in point.tolist()]
    largest = max(range(len(weights)), key=weights.__getitem__)
    weights[largest] = round(1 - math.fsum(w for k, w in enumerate(weights) if k != largest), DIGITS)
    return tuple(weights)
