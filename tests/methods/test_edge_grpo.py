"""EDGE-GRPO: worked example with both means and the release's entropies, relative entropies."""

import pytest
import torch

import hapo
from hapo.parts.entropy import mean_entropy
from hapo.parts.reduce import sequence_mean, token_mean
from hapo.parts.shaping import relative_entropy
from tests.examples import OLD, close, loss_and_grad, on_tokens, padded, worked_batch


@pytest.mark.parametrize(("reduce", "loss"), [(sequence_mean, -0.290736), (token_mean, -0.308772)])
def test_edge_grpo(reduce, loss):
    batch, method = worked_batch(), hapo.method("edge_grpo").replace(reduce=reduce)
    close(method.prepare(batch).advantage, on_tokens([0.959033, -0.747246, -0.558109, 2.241739, 0.0, 0.0], OLD))
    actual, grad, _ = loss_and_grad(method, batch)
    assert actual == pytest.approx(loss, abs=1e-6)
    expected = [
        [0.0, -0.034394, -0.042008, 0.0],
        [0.0, 0.068820],
        [0.031632, 0.0, 0.046256],
        [-0.186812, -0.152948],
        [0.0],
        [0.0],
    ]
    if reduce is token_mean:  # a token's weight is 1/16 instead of 1 / (6 n)
        grad = grad * 16 / (6 * batch.mask.sum(-1, keepdim=True))
    close(grad, expected)


def test_edge_grpo_relative_entropies():
    batch = worked_batch()
    p = mean_entropy(batch.old_entropy, batch.mask)
    close(p.unsqueeze(1), [[0.467500], [0.600000], [0.803333], [0.200000], [0.270000], [1.000000]])
    relative = relative_entropy(batch.old_entropy, batch.group, batch.mask)
    close(relative, [[0.903018], [1.158954], [1.551710], [0.386318], [0.425197], [1.574803]])
    for k in (0, 1):
        assert relative[batch.group == k].mean().item() == pytest.approx(1)
    scaled = batch.old_entropy * torch.where(batch.group == 0, 5.0, 0.2).unsqueeze(1)
    torch.testing.assert_close(relative_entropy(scaled, batch.group, batch.mask), relative)


def test_edge_grpo_release():
    advantage = hapo.method("edge_grpo", variant="release").prepare(worked_batch()).advantage
    close(advantage, on_tokens([0.670744, -1.045243, -0.520453, 3.135728, 0.0, 0.0], OLD))


def test_edge_grpo_borders():
    """Equal entropies change nothing; an entropy of 0 is floored, and a clamp holds it."""
    batch = worked_batch(old_entropy=torch.full((6, 4), 0.4))
    base = hapo.method("grpo").prepare(batch).advantage
    torch.testing.assert_close(hapo.method("edge_grpo").prepare(batch).advantage, base)
    certain = batch.replace(old_entropy=padded([[0.0] * 4, [0.4] * 4, [0.4] * 4, [0.4] * 4, [0.0] * 4, [0.0] * 4]))
    advantage = hapo.method("edge_grpo").prepare(certain).advantage[:, 0]
    torch.testing.assert_close(advantage, base[:, 0] * torch.tensor([1e6, 0.75, 0.75, 0.75, 1.0, 1.0]))
    clamped = hapo.method("edge_grpo", clamp=(0.1, 10.0)).prepare(certain).advantage[:, 0]
    assert clamped[0].item() == pytest.approx(base[0, 0].item() / 0.1)
    assert clamped[1].item() == pytest.approx(base[1, 0].item() * 0.75)


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_edge_grpo_leaves_certain_groups_alone_and_counts_no_unscored_row(variant):
    method = hapo.method("edge_grpo", variant=variant)
    batch = worked_batch()
    certain = method.prepare(batch.replace(old_entropy=torch.zeros_like(batch.old_entropy)))
    torch.testing.assert_close(certain.advantage, hapo.method("grpo").prepare(batch).advantage)
    reward = batch.reward.clone()
    reward[1] = torch.nan
    rows = [0, 2, 3, 4, 5]
    dropped = method.prepare(batch.replace(reward=reward)).advantage[rows]
    torch.testing.assert_close(dropped, method.prepare(batch.rows(rows)).advantage)
