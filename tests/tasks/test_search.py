"""The search over the simplex: its points, the traps of the libraries, and that it repeats itself."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from hapo.tasks import search
from hapo.tasks.search import APART, GaussianProcess, Trial, design, log_expected_improvement, on_simplex, propose

CENTRE = (0.5, 0.3, 0.2)


def value(weights: tuple[float, ...], seed: int = 0) -> float:
    """A peak at CENTRE, with noise."""
    noise = torch.randn((), generator=torch.Generator().manual_seed(seed)).item()
    return -sum((a - b) ** 2 for a, b in zip(weights, CENTRE, strict=True)) + 0.02 * noise


def is_on_simplex(weights: tuple[float, ...]) -> bool:
    return min(weights) >= 0 and abs(math.fsum(weights) - 1) <= 1e-12


def searched(size: int, failed=lambda weights: False) -> list[Trial]:
    trials: list[Trial] = []
    while len(trials) < size:
        weights = propose(trials, 3, 5, seed=1)
        trials.append(Trial(weights, None if failed(weights) else value(weights, len(trials))))
    return trials


def test_the_simplex_map_of_the_spec():
    found = on_simplex(torch.tensor([[0.5, 0.2, 0.9]], dtype=torch.float64))[0].tolist()
    assert found == pytest.approx([0.287858, 0.668386, 0.043755], abs=1e-6)


@pytest.mark.parametrize(
    "u", [[0.0, 0.5, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.3]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_u_of_exactly_0_or_1_stays_on_the_simplex(u, dtype):
    weights = on_simplex(torch.tensor([u], dtype=dtype))[0]
    assert weights.isfinite().all() and is_on_simplex(tuple(weights.tolist()))
    assert (weights.argmax() == u.index(min(u))) or len(set(u)) == 1


@pytest.mark.parametrize(("channels", "size"), [(2, 2), (2, 7), (3, 3), (3, 9), (5, 12)])
def test_the_design_begins_with_the_vertices_and_grows_by_its_end(channels, size):
    points = design(channels, size, seed=3)
    assert points[:channels] == [tuple(float(i == k) for i in range(channels)) for k in range(channels)]
    assert len(points) == size == len(set(points)) and all(map(is_on_simplex, points))
    assert design(channels, size + 4, seed=3)[:size] == points
    assert size <= channels or design(channels, size, seed=4) != points
    assert [propose([Trial(w, 0.0) for w in points[:n]], channels, size, 3) for n in range(size)] == points


def test_a_search_meets_the_constraint_finds_the_peak_and_repeats_itself():
    trials = searched(8)
    assert all(is_on_simplex(trial.weights) for trial in trials)
    best = trials[GaussianProcess(trials).best]
    assert value(best.weights) > max(value(w) for w in design(3, 3, 0))
    torch.manual_seed(12345)  # what others draw is no part of it
    state = torch.get_rng_state()
    with torch.no_grad():
        again = propose(trials[:7], 3, 5, seed=1)
    assert again == trials[7].weights and torch.equal(torch.get_rng_state(), state)
    assert propose(trials[:7], 3, 5, seed=2) != again


def test_a_failed_point_is_never_tried_again():
    """Half of the simplex fails, the better half: the optimum is there, and the process is drawn to it."""
    trials = searched(9, failed=lambda weights: weights[0] > 0.35)
    failed = [trial.weights for trial in trials if trial.value is None]
    assert len(failed) >= 3
    for n, trial in enumerate(trials[5:], 5):
        before = [other.weights for other in trials[:n] if other.value is None]
        assert min(math.dist(trial.weights, other) for other in before) >= APART
    assert trials[GaussianProcess(trials).best].value is not None


def test_beside_a_failed_point_the_best_of_those_apart_is_taken(monkeypatch):
    """What the optimiser returns is a failed point, as a sampler of another library did 30 times in 30."""
    trials = [Trial(w, value(w)) for w in design(3, 6, 0)]
    where = GaussianProcess(trials).propose(0)
    trials.append(Trial(where, None))
    botorch = search._botorch()
    monkeypatch.setattr(
        botorch.optim, "optimize_acqf", lambda *args, **kwargs: (torch.tensor([where], dtype=torch.float64), None)
    )
    other = GaussianProcess(trials).propose(0)
    assert math.dist(other, where) >= APART and is_on_simplex(other)


def test_a_failed_trial_counts_with_the_worst_value_seen_not_with_0():
    points = design(3, 6, 0)
    trials = [Trial(w, 5.0 + n) for n, w in enumerate(points[:5])] + [Trial(points[5], None)]
    process = GaussianProcess(trials)
    assert process._values.squeeze(1).tolist() == [5.0, 6.0, 7.0, 8.0, 9.0, 5.0]
    assert process.best != 5


@pytest.mark.parametrize("values", [[0.0] * 6, [0.7] * 6, [0.7, None, None, None, None, None]])
def test_equal_values_and_a_single_one_are_no_fault(values):
    trials = [Trial(w, v) for w, v in zip(design(3, 6, 0), values, strict=True)]
    assert is_on_simplex(propose(trials, 3, 6, 0))
    mean, deviation = GaussianProcess(trials).posterior(torch.eye(3, dtype=torch.float64))
    assert mean.isfinite().all() and (deviation >= 0).all() and deviation.isfinite().all()


def test_the_process_goes_by_the_trials_and_is_surer_there():
    trials = [Trial(w, value(w)) for w in design(3, 12, 0)]
    process = GaussianProcess(trials)
    points = torch.tensor([trial.weights for trial in trials], dtype=torch.float64)
    mean, deviation = process.posterior(points)
    measured = torch.tensor([trial.value for trial in trials], dtype=torch.float64)
    assert torch.corrcoef(torch.stack([mean, measured]))[0, 1] > 0.9
    assert deviation.mean() < measured.std()


def test_a_measurement_is_taken_for_no_surer_than_its_error():
    """One lucky trial of twelve: without its error the surface bends to it."""
    points = design(3, 12, 0)
    plain = [Trial(w, 0.4 if i == 7 else 0.3) for i, w in enumerate(points)]
    known = [Trial(t.weights, t.value, 0.03) for t in plain]
    at = torch.tensor([points[7]], dtype=torch.float64)
    (bent,), (sure,) = GaussianProcess(plain).posterior(at)
    (mean,), (unsure,) = GaussianProcess(known).posterior(at)
    assert mean < 0.37 < 0.39 < bent and unsure > 2 * sure
    some = [*known[:-1], plain[-1]]  # one error is not known: the noise is fitted as before
    assert GaussianProcess(some).posterior(at)[0] == bent


def test_a_failed_trial_has_the_largest_error():
    points = design(3, 4, 0)
    process = GaussianProcess(
        [*(Trial(w, 0.3, 0.01 * (i + 1)) for i, w in enumerate(points[:3])), Trial(points[3], None)]
    )
    assert process._noise is not None
    assert process._noise.squeeze(1).sqrt().tolist() == pytest.approx([0.01, 0.02, 0.03, 0.03])


@pytest.mark.parametrize("error", [0.0, -0.1, math.nan, math.inf])
def test_an_error_is_above_0(error):
    with pytest.raises(ValueError, match="standard errors of trials must be above 0 and finite"):
        GaussianProcess([Trial(w, 0.1, error) for w in design(2, 2, 0)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 1, 4, 0), "1 channel leaves nothing to search"),
        (([], 3, 2, 0), "the design must hold the 3 vertices: set initial to 3"),
        (([Trial(w, None) for w in design(3, 3, 0)], 3, 6, 0), "all 3 trials failed"),
    ],
)
def test_what_cannot_be_searched_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        propose(*arguments)


@pytest.mark.parametrize("values", [[None, None], [], [0.1, math.nan], [math.inf, 0.0]])
def test_a_process_needs_finite_values(values):
    with pytest.raises(ValueError, match="must be finite, one at least"):
        GaussianProcess([Trial(w, v) for w, v in zip(design(2, len(values), 0), values, strict=True)])


def test_without_botorch_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "botorch", None)
    with pytest.raises(ImportError, match=r"pip install 'hapo\[shape\]'"):
        GaussianProcess([Trial(w, 0.0) for w in design(2, 2, 0)]).propose(0)


# -- what is relied on: botorch's own closed form, the noise-free case --------------------------------------


class Known(torch.nn.Module):
    """A posterior of given mean and deviation, for a point that is its own mean."""

    num_outputs = 1

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation

    def posterior(self, X, *args, **kwargs):
        botorch = search._botorch()
        with search._quiet():
            from gpytorch.distributions import MultivariateNormal

            mean = X[..., 0]
            covariance = torch.full((*mean.shape, 1), self.deviation**2, dtype=X.dtype)
            return botorch.posteriors.GPyTorchPosterior(MultivariateNormal(mean, covariance))


def log_ei(mean: float, deviation: float, best: float) -> float:
    search._botorch()
    from botorch.acquisition import LogExpectedImprovement

    acquisition = LogExpectedImprovement(Known(deviation), best_f=torch.tensor(best, dtype=torch.float64))
    return acquisition(torch.tensor([[[mean]]], dtype=torch.float64)).item()


@pytest.mark.parametrize(
    ("mean", "deviation", "best", "expected"),
    [
        (0.3, 0.2, 0.5, -4.094559),
        (0.3, 0.2, 0.1, -1.529412),
        (-10.0, 1.0, 0.0, -55.553122),
        (-40.0, 1.0, 0.0, -808.298569),
    ],
)
def test_log_expected_improvement_of_the_spec(mean, deviation, best, expected):
    assert log_ei(mean, deviation, best) == pytest.approx(expected, abs=1e-6)
    ours = log_expected_improvement(torch.tensor([mean]).double(), torch.tensor([deviation]).double(), best)
    assert ours.item() == pytest.approx(expected, abs=1e-6)


def test_log_expected_improvement_is_finite_and_grows_with_the_mean():
    values = [log_ei(float(u), 1.0, 0.0) for u in range(-40, 6)]
    assert all(map(math.isfinite, values)) and values == sorted(values)
    u = torch.arange(-40, 6).double()
    assert log_expected_improvement(u, torch.ones_like(u), 0.0).tolist() == pytest.approx(values, abs=1e-9)


def test_the_closed_form_has_no_step_where_its_branches_meet():
    u = torch.cat([torch.linspace(-1e4, 6, 5001), torch.linspace(-101, -99, 201), torch.linspace(-1.1, -0.9, 201)])
    found = log_expected_improvement(u.sort().values.double(), torch.ones(len(u)), 0.0)
    assert bool(found.isfinite().all()) and bool((found.diff() >= 0).all())
    with pytest.raises(ValueError, match="deviation must be above 0"):
        log_expected_improvement(torch.zeros(1), torch.zeros(1), 0.0)
