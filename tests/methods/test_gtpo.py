"""GTPO: worked example in three modes, column sums, signs."""

import pytest
import torch

import hapo
from hapo.parts.shaping import entropy_shaped_reward
from tests.examples import close, loss_and_grad, shares_batch

CORRECT = torch.tensor([True, True, False, False])


@pytest.mark.parametrize(
    ("variant", "advantage", "loss", "grad"),
    [
        (
            "padded",
            [
                [0.900025, 0.785128, 0.842577],
                [0.785128, 0.900025],
                [-0.996183, -1.053655, -1.053655],
                [-1.111128],
            ],
            -0.085377,
            [[-0.110003, -0.109046, -0.084258], [-0.087236, 0.0], [0.099618, 0.0, 0.128780], [0.111113]],
        ),
        (
            "own",
            [[0.999970, -0.999970, 0.0], [-0.999970, 0.999970], [1.224700, 0.0, 0.0], [-1.224700]],
            -0.014444,
            [[-0.122219, 0.138885, 0.0], [0.111108, 0.0], [-0.122470, 0.0, 0.0], [0.122470]],
        ),
    ],
)
def test_gtpo(variant, advantage, loss, grad):
    batch, method = shares_batch(), hapo.method("gtpo", variant=variant)
    close(method.prepare(batch).advantage, advantage)
    actual, gradient, out = loss_and_grad(method, batch)
    assert actual == pytest.approx(loss, abs=1e-6)
    close(gradient, grad)
    close(out.tokens["ratio"], [[1.1, 1.25, 0.9], [1.0, 1.4], [0.9, 0.7, 1.1], [0.9]], batch.mask)


@pytest.mark.parametrize(
    ("clip", "shaped"),
    [
        (
            None,
            [[1.133333, 1.066667, 1.1], [1.066667, 1.133333], [-1.066667, -1.1, -1.1], [-1.133333]],
        ),
        (
            (0.2, 0.28),
            [[1.1, 1.083333, 1.1], [1.1, 1.116667], [-1.094340, -1.1, -1.1], [-1.105660]],
        ),
    ],
)
def test_gtpo_shaped_rewards(clip, shaped):
    batch = shares_batch()
    entropy = batch.old_entropy if clip is None else batch.old_entropy.clamp(*clip)
    close(entropy_shaped_reward(entropy, CORRECT, batch.group, batch.mask), shaped)


def test_gtpo_columns_sum_to_the_number_of_responses_alive():
    """So 0.9 and 0.1 leave the total of the binary reward; a column's unit of entropy does not matter."""
    batch = shares_batch()
    shaped = entropy_shaped_reward(batch.old_entropy, CORRECT, batch.group, batch.mask, base=0.9, bonus=0.1)
    close(shaped[CORRECT].sum(0, keepdim=True), [[2.0, 2.0, 1.0]])
    close(shaped[~CORRECT].sum(0, keepdim=True), [[-2.0, -1.0, -1.0]])
    other_unit = batch.old_entropy * torch.tensor([7.0, 0.3, 2.0])
    torch.testing.assert_close(
        entropy_shaped_reward(other_unit, CORRECT, batch.group, batch.mask, base=0.9, bonus=0.1), shaped
    )


def test_gtpo_padded_keeps_the_sign_and_own_balances_each_sign():
    batch = shares_batch()
    padded = hapo.method("gtpo").prepare(batch).advantage
    assert (padded[batch.mask & CORRECT.unsqueeze(1)] > 0).all()
    assert (padded[batch.mask & ~CORRECT.unsqueeze(1)] < 0).all()
    own = hapo.method("gtpo", variant="own").prepare(batch).advantage
    assert own[CORRECT].sum().item() == pytest.approx(0, abs=1e-6)
    alone = hapo.method("gtpo").prepare(batch.replace(group=torch.arange(4))).advantage
    assert (alone == 0).all()


@pytest.mark.parametrize("name", ["gtpo", "grpo_s"])
def test_entropies_that_hardly_differ_are_compared_in_float64(name):
    """ "own" divides by their small spread: float32 shares would lose three digits there."""
    batch = shares_batch()
    similar = 1.0 + 1e-3 * batch.old_entropy
    results = [
        hapo.method(name, variant="own")
        .prepare(
            batch.replace(old_entropy=h, old_logp=batch.old_logp.to(h.dtype), reward=batch.reward.to(h.dtype))
        )
        .advantage
        for h in (similar, similar.double())
    ]
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-5, atol=1e-5)
