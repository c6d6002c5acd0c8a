"""HAPO: worked example of the paper's and the release's form, temperatures, options."""

import pytest
import torch

import hapo
from hapo.parts.shaping import redistribute
from tests.examples import ENTROPY, OLD, close, loss_and_grad, on_tokens, worked_batch

HAPO_H = [
    [0.360275, -0.642332, -0.090107, -0.845961],
    [0.000000, -0.244146],
    [-1.000000, 1.000000, -0.180214],
    [-0.398186, -0.284664],
    [-0.055850, -0.537882, -0.755854],
    [-0.130625, 0.639725],
]


def test_hapo_paper():
    batch = worked_batch()
    method = hapo.method("hapo", eps_low=0.2, eps_high=0.28, filter_groups=False)
    prepared = method.prepare(batch)
    stats = prepared.stats
    assert stats.pivot == pytest.approx(-0.105361, abs=1e-6)
    assert stats.sigma == pytest.approx(1.571213, abs=1e-6)
    assert stats.h_max == pytest.approx(0.798508, abs=1e-6)
    assert stats.h_min == pytest.approx(-4.499810, abs=1e-6)
    close(prepared.signal, HAPO_H)
    close(
        prepared.advantage,
        on_tokens([0.912869, -1.095443, -1.095443, 0.912869, 0.0, 0.0], OLD),
    )
    loss, grad, out = loss_and_grad(method, batch)
    assert loss == pytest.approx(-0.028906, abs=1e-6)
    close(
        grad,
        [
            [-0.094793, -0.049107, -0.054575, 0.0],
            [0.0, 0.057192],
            [0.0, 0.0, 0.102138],
            [-0.034336, -0.046712],
            [0.0],
            [0.0],
        ],
    )
    close(
        out.tokens["advantage"],
        [
            [1.241753, 0.912869, 0.830613, 0.912869],
            [-1.095443, -0.827994],
            [0.0, -2.190886, -1.095443],
            [0.549378, 0.912869],
            [0.0],
            [0.0],
        ],
    )
    close(
        out.tokens["low"],
        [
            [0.200000, 0.328466, 0.218021, 0.369192],
            [0.200000, 0.248829],
            [0.400000, 0.200000, 0.236043],
            [0.279637, 0.256933],
            [0.211170, 0.307576, 0.351171],
            [0.226125, 0.200000],
        ],
        batch.mask,
    )
    close(
        out.tokens["high"],
        [
            [0.380877, 0.28, 0.28, 0.28],
            [0.28, 0.28],
            [0.28, 0.56, 0.28],
            [0.28, 0.28],
            [0.28, 0.28, 0.28],
            [0.28, 0.459123],
        ],
        batch.mask,
    )
    # C, read off an advantage of 1 everywhere: it has no meaning where h = 0
    changed = redistribute(batch.mask.float(), out.tokens["ratio"], prepared.signal, 0.2, 0.28) != batch.mask
    close(changed, [[1, 0, 1, 0], [0, 1], [1, 1, 0], [1, 0], [1, 1, 1], [0, 1]])
    on_policy, _, _ = loss_and_grad(method, batch.replace(logp=batch.old_logp.clone().requires_grad_()))
    assert on_policy == pytest.approx(0.031495, abs=1e-6)


def test_hapo_release():
    batch = worked_batch()
    method = hapo.method("hapo", variant="release", eps_low=0.2, eps_high=0.28, filter_groups=False)
    close(method.prepare(batch).signal, [[abs(h) for h in row] for row in HAPO_H])
    loss, grad, out = loss_and_grad(method, batch)
    assert loss == pytest.approx(-0.071567, abs=1e-6)
    close(
        grad,
        [
            [-0.094793, -0.080650, -0.059980, -0.149456],
            [0.0, 0.075666],
            [0.069848, 0.0, 0.120545],
            [-0.057054, -0.060009],
            [0.0],
            [0.0],
        ],
    )
    close(
        out.tokens["advantage"],
        [
            [1.241753, 1.499234, 0.912869, 1.685121],
            [-1.095443, -1.095443],
            [-1.095443, -2.190886, -1.292857],
            [0.912869, 1.172730],
            [0.0],
            [0.0],
        ],
    )
    close(
        out.tokens["high"],
        [
            [0.380877, 0.459853, 0.305230, 0.516869],
            [0.280000, 0.348361],
            [0.560000, 0.560000, 0.330460],
            [0.391492, 0.359706],
            [0.295638, 0.430607, 0.491639],
            [0.316575, 0.459123],
        ],
        batch.mask,
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"temperature": {"rule": "bounded", "tau": 0.1}},
            [0.900000, 0.915404, 0.960181, 1.0, 1.036027, 1.100000],
        ),
        ({"temperature": {"rule": "zscore", "tau": 0.1}}, [0.1, 0.757725, 0.885963, 1.0, 1.018310, 1.050821]),
        ({"variant": "release"}, [1.050000, 1.042298, 1.019909, 1.0, 1.018014, 1.050000]),
    ],
)
def test_hapo_temperature(options, expected):
    """T for H = 0, 0.02, 0.15, 0.9, 1.2 and 2, through logits of exactly these entropies."""
    method = hapo.method("hapo", **options)
    stats = hapo.method("hapo", filter_groups=False).prepare(worked_batch()).stats
    entropies = [0.0, 0.02, 0.15, 0.9, 1.2, 2.0]
    logits = torch.stack([_logits_of_entropy(h) for h in entropies])
    actual = method.temperature(logits, stats)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=2e-5)
    half = method.temperature(0.5 * logits, stats, t_base=0.5)
    torch.testing.assert_close(half, 0.5 * torch.tensor(expected), rtol=0, atol=2e-5)
    assert (method.temperature(logits, None, t_base=0.7) == 0.7).all()


@pytest.mark.parametrize("name", ["dapo", "gspo", "stapo"])
def test_hapo_temperature_with_another_loss(name):
    """Statistics and temperatures are HAPO's, whatever the loss."""
    batch, logits = worked_batch(), torch.stack([_logits_of_entropy(h) for h in (0.02, 0.9, 2.0)])
    hapos = hapo.method("hapo", filter_groups=False)
    theirs = hapo.method(name, filter_groups=False, temperature={"tau": 0.1})
    stats = hapos.prepare(batch).stats
    assert theirs.prepare(batch).stats == stats
    assert torch.equal(theirs.temperature(logits, stats), hapos.temperature(logits, stats))
    assert (hapo.method(name).temperature(logits, stats) == 1).all()


def _logits_of_entropy(entropy: float, vocabulary: int = 16) -> torch.Tensor:
    """One token with logit x, the others 0, x by bisection in float64."""
    if entropy == 0.0:
        return torch.tensor([0.0] + [-torch.inf] * (vocabulary - 1))
    low, high = 0.0, 60.0
    for _ in range(200):
        x = (low + high) / 2
        z = torch.tensor([x] + [0.0] * (vocabulary - 1), dtype=torch.float64)
        p = z.softmax(0)
        low, high = (x, high) if -(p * p.log()).sum() > entropy else (low, x)
    return z.float()


def test_entropy_example_has_no_ties():
    flat = [h for row in ENTROPY for h in row]
    assert len(set(flat)) == len(flat)
