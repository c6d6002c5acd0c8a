"""RLOO: worked example, relation to Dr. GRPO, KL in the reward, the clip option."""

import pytest
import torch

import hapo
from tests.examples import close, example, loss_and_grad, on_tokens, worked_batch

OLD = [[-1.0, -0.2, -0.7], [-1.5, -0.4], [-0.05, -2.0, -0.6], [-0.3, -0.9], [-0.8]]
NEW = [[-0.8, -0.35, -0.65], [-1.8, -0.3], [-0.03, -2.25, -0.2], [-0.3, -1.1], [-0.7]]


def rloo_batch() -> hapo.TokenBatch:
    return example(old=OLD, new=NEW, reward=[1.0, 0.0, 0.5, 1.0, 1.0], group=[0, 0, 0, 1, 2])


@pytest.mark.parametrize("ids", [[0, 0, 0, 1, 2], [907, 907, 907, -3, 12]])
def test_rloo(ids):
    batch, method = rloo_batch().replace(group=torch.tensor(ids)), hapo.method("rloo")
    close(method.prepare(batch).advantage, on_tokens([0.75, -0.75, 0.0, 0.0, 0.0], OLD))
    loss, grad, _ = loss_and_grad(method, batch)
    assert loss == pytest.approx(-0.193109, abs=1e-6)
    close(grad, [[-0.183210, -0.129106, -0.157691], [0.111123, 0.165776], [0.0], [0.0], [0.0]])


def test_rloo_is_dr_grpos_advantage_times_n_over_n_minus_1():
    batch = worked_batch(reward=torch.tensor([1.0, 0.0, 0.25, 1.0, 0.5, 0.0]))
    advantage = hapo.method("rloo").prepare(batch).advantage
    centred = hapo.method("dr_grpo").prepare(batch).advantage
    torch.testing.assert_close(advantage[:4], centred[:4] * 4 / 3)
    torch.testing.assert_close(advantage[4:], centred[4:] * 2)
    assert advantage[:4, 0].sum().item() == pytest.approx(0, abs=1e-6)


def test_rloo_takes_the_kl_off_the_reward():
    old, beta = torch.tensor([sum(row) for row in OLD[:3]]), 0.1
    batch = rloo_batch().rows(slice(3)).replace(ref_logp=torch.full((3, 3), -0.5))
    reward = torch.tensor([1.0, 0.0, 0.5]) - beta * (old - torch.tensor([-1.5, -1.0, -1.5]))
    advantage = hapo.method("rloo", kl_coef=beta).prepare(batch).advantage
    torch.testing.assert_close(advantage[:, 0], (reward - reward.mean()) * 1.5)
    with pytest.raises(ValueError, match="reads TokenBatch.ref_logp"):
        hapo.method("rloo", kl_coef=beta).prepare(rloo_batch())


def test_rloo_clips_where_told():
    _, plain, _ = loss_and_grad(hapo.method("rloo"), rloo_batch())
    _, clipped, out = loss_and_grad(hapo.method("rloo", clip=(0.2, 0.2)), rloo_batch())
    assert out.tokens["clipped"].nonzero().tolist() == [[0, 0], [1, 0]]
    assert torch.equal(clipped, torch.where(out.tokens["clipped"], 0.0, plain))
