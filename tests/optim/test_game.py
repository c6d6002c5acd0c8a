"""What the game of bench/game.py measures with, and its optimistic Adam."""

import pytest
import torch
from torch import nn

from bench.game import OptimisticAdam, energy_distance, exponent, marks


def test_optimistic_adam_is_two_steps_less_the_last_one():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4, dtype=torch.float64))
    optimizer = OptimisticAdam([p], lr=0.1, betas=(0.5, 0.9), eps=0.0)
    x, m, v, last = p.detach().clone(), 0.0, 0.0, None
    for t in range(1, 20):
        p.grad = g = torch.randn(4, dtype=torch.float64)
        optimizer.step()
        m, v = 0.5 * m + 0.5 * g, 0.9 * v + 0.1 * g * g
        d = -0.1 * (m / (1 - 0.5**t)) / (v / (1 - 0.9**t)).sqrt()
        x = x + (d if last is None else 2 * d - last)
        last = d
        torch.testing.assert_close(p.detach(), x, rtol=0, atol=1e-14)


def test_the_energy_distance_tells_distributions_apart():
    torch.manual_seed(0)
    a, b = torch.randn(2, 1000, 2)
    assert abs(energy_distance(a, b)) < 0.01
    assert energy_distance(torch.zeros(3, 1), torch.ones(4, 1)) == 2


def test_the_exponent_is_that_of_a_power():
    at = marks(2000)
    assert at[0] == 1 and at[-1] == 2000
    assert exponent([3 * k**0.4 for k in at], at) == pytest.approx(0.4)
