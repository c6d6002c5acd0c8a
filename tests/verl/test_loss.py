"""The method's loss inside verl's own: its KL penalty and entropy bonus are added, its counts are not ours."""

import pytest
import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils import torch_functional
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

import hapo
from hapo.engines.verl.loss import micro_batch, policy_loss, shares, token_batch
from hapo.engines.verl.worker import accurate_entropy

LENGTHS, PROMPT = (5, 3, 4, 2), 2


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def test_verls_own_terms_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """L = the method's + kl_loss_coef mean k3 - entropy_coeff mean entropy, and the gradient of each."""
    generator = torch.Generator().manual_seed(0)

    def token(scale: float = 1.0) -> list[torch.Tensor]:
        return [scale * torch.rand(n, generator=generator) for n in LENGTHS]

    old, ref, advantage = [-x for x in token()], [-x for x in token()], token(2.0)
    ones = [torch.ones(n, dtype=torch.long) for n in LENGTHS]
    data = TensorDict(
        {
            "prompts": nested([torch.ones(PROMPT, dtype=torch.long) for _ in LENGTHS]),
            "responses": nested(ones),
            "response_mask": nested(ones),
            "old_log_probs": nested(old),
            "ref_log_prob": nested(ref),
            "advantages": nested(advantage),
            "hapo_mask": nested([x.bool() for x in ones]),
            "hapo_reward": torch.ones(len(LENGTHS)),
            "hapo_group": torch.zeros(len(LENGTHS), dtype=torch.long),
        },
        batch_size=len(LENGTHS),
    )
    tu.assign_non_tensor(data, dp_size=2, batch_num_tokens=sum(LENGTHS), global_batch_size=len(LENGTHS))
    logps = [-torch.rand(n + PROMPT, generator=generator) for n in LENGTHS]
    logp = torch.cat(logps).requires_grad_()
    entropy = torch.rand(len(logp), generator=generator).requires_grad_()
    offsets = torch.tensor([0, *(n + PROMPT for n in LENGTHS)]).cumsum(0)
    outputs = {
        name: torch.nested.nested_tensor_from_jagged(values, offsets)
        for name, values in (("log_probs", logp), ("entropy", entropy))
    }
    config = ActorConfig(
        strategy="fsdp2",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=4,
        policy_loss=PolicyLossConfig(loss_mode="hapo"),
        use_kl_loss=True,
        kl_loss_coef=0.3,
        kl_loss_type="low_var_kl",
        entropy_coeff=0.05,
    )
    method = hapo.method("dapo", filter_groups=False)
    batch = method.step(token_batch(data))
    with micro_batch(method, batch, ranks=2) as current:
        loss, metrics = ppo_loss(config, outputs, data)
    assert current.out is not None
    # Of each row verl takes the outputs that predict its response: shifted by one.
    ends = zip(offsets[1:].tolist(), LENGTHS, strict=True)
    kept = torch.cat([torch.arange(end - n - 1, end - 1) for end, n in ends])
    now = logp.detach()[kept].requires_grad_()
    ours = method.loss(batch.replace(logp=torch.zeros(batch.mask.shape).masked_scatter(batch.mask, now))).loss
    gap = torch.cat(ref) - now
    expected = 2 * (ours + 0.3 * (gap.exp() - gap - 1).mean() - 0.05 * entropy[kept].mean())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    (gradient,) = torch.autograd.grad(expected, now)
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad[kept], gradient, rtol=1e-5, atol=1e-6)
    assert metrics["actor/pg_loss"].aggregate() == pytest.approx(2 * float(ours.detach()), abs=1e-6)
    assert shares(current.out, 2)["hapo/ratio/mean"].aggregate() == pytest.approx(
        2 * float(current.out.metrics["ratio"])
    )


def test_outside_of_the_trainer_the_loss_refuses() -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(RuntimeError, match="set trainer.v1.trainer_mode=hapo"):
        policy_loss(x, x, x, x)


@torch.no_grad()
def test_small_entropies_are_not_lost() -> None:
    """Of a token that is all but certain verl's own formula keeps nothing."""
    logits = torch.zeros(3, 50_000)
    logits[:, 7] = torch.tensor([22.0, 26.0, 30.0])
    logits += 18.3  # a shift changes no entropy
    exact = torch.distributions.Categorical(logits=logits.double()).entropy()
    ours = accurate_entropy(torch_functional.entropy_from_logits)(logits)
    torch.testing.assert_close(ours.double(), exact, rtol=0.02, atol=1e-8)
    theirs = torch_functional.entropy_from_logits(logits)
    assert ((theirs - exact).abs() / exact).max() > 0.5
