"""Every method through hapo's side of verl, in this process: no Ray, no rollout, verl's own loss around the method's.

Whole runs of two methods (test_runs.py, test_replay.py) prove that verl hands over what is given by hand here.
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import response_to_nested

import hapo
from hapo.engines.verl.estimator import estimate, estimation
from hapo.engines.verl.plan import RolloutPlan
from hapo.engines.verl.worker import HAPOActor

LENGTHS, PROMPT = torch.tensor([5, 3, 4, 2, 6, 1, 5, 4, 3, 4]), 2
ROWS, WIDTH = len(LENGTHS), int(LENGTHS.max())
MICRO_BATCHES = ([0, 3, 6, 8], [1, 2, 4, 5, 7, 9])
CONFIG = ActorConfig(
    strategy="fsdp2",
    rollout_n=4,
    ppo_micro_batch_size_per_gpu=4,
    policy_loss=PolicyLossConfig(loss_mode="hapo"),
    use_kl_loss=True,  # of weight 0: there is a reference model, for methods that weigh the penalty per token
    kl_loss_coef=0.0,
    calculate_entropy=True,
)


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A process group of one."""
    store = Path(tmp_path_factory.mktemp("group")) / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def batch_of() -> hapo.TokenBatch:
    """Two groups of four responses and one of two with equal verdicts, which some methods drop."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(WIDTH) < LENGTHS.unsqueeze(1)

    def token(scale: float) -> Tensor:
        return scale * torch.rand(ROWS, WIDTH, generator=generator) * mask

    old = token(-2.0)
    return hapo.TokenBatch(
        mask=mask,
        old_logp=old,
        logp=old + token(1.0) - token(1.0),
        ref_logp=old - token(0.5),
        sampler_logp=old - token(0.5),
        old_entropy=token(1.5),
        entropy=token(1.5),
        reward=torch.tensor([1.0, 0, 0, 1, 0, 2, 1, 0, 1, 1]),
        verdict=torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 0, 1, 1]),
        group=torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 2, 2]),
    )


def outputs_of(data: TensorDict, batch: hapo.TokenBatch) -> dict[str, Tensor]:
    """What the engine returns of these rows: prompt and response in one, each token's number at the one before."""

    def whole(rows: Tensor) -> Tensor:
        lengths = data["responses"].offsets().diff().tolist()
        made = [torch.nn.functional.pad(row[:n], (PROMPT - 1, 1)) for row, n in zip(rows, lengths, strict=True)]
        return torch.nested.as_nested_tensor(made, layout=torch.jagged)

    assert batch.logp is not None and batch.entropy is not None
    return {"log_probs": whole(batch.logp), "entropy": whole(batch.entropy)}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in hapo.methods("policy") if not hapo.method(name).likelihood),
        ("hapo", {"entropy_source": "current"}),
        ("hapo", {"advantage": "token_reward", "gamma": 0.9}),
        ("dr_grpo", {"advantage": "token_reward", "finished": "out"}),
    ],  # a signal in the loss
)
def test_advantage_loss_and_gradient(name: str, options: dict[str, Any]) -> None:
    """Those of the core on the whole mini-batch, though verl sees two micro-batches, and only its own fields."""
    own_penalty = name == "archer"
    cap = None if name == "vespo" else 2.0  # its own weight corrects for the sampler
    method = hapo.method(name, sampler_cap=cap, **options, **({} if own_penalty else {"kl_coef": 0.0}))
    batch = batch_of()
    rewards = torch.zeros(ROWS, WIDTH)
    rewards[torch.arange(ROWS), LENGTHS - 1] = batch.reward
    if method.credit is not None:
        rewards[:, 0] += torch.arange(ROWS) / 4  # the row of length 1 has all on one token
        batch = batch.replace(token_reward=rewards, reward=rewards.sum(1))
    prepared = method.prepare(batch)

    given = ("old_logp", "old_entropy", "ref_logp", "verdict", "sampler_logp")
    uids = np.array(list("bbbbaaaacc"), dtype=object)
    with estimation(method, {field: getattr(batch, field) for field in given}) as current:
        advantage, _ = estimate(rewards, batch.mask.float(), index=uids)
    assert torch.equal(advantage, prepared.advantage)
    frozen = current.prepared
    assert frozen is not None

    lengths = torch.nested.as_nested_tensor(
        [torch.ones(n, dtype=torch.long) for n in LENGTHS], layout=torch.jagged
    )
    tokens = {
        "old_log_probs": frozen.old_logp,
        "ref_log_prob": frozen.ref_logp,
        "rollout_log_probs": frozen.sampler_logp,
        "rollout_is_weights": frozen.weight,
        "entropy": frozen.old_entropy,
        "advantages": frozen.advantage,
        "hapo_mask": frozen.mask,
        "hapo_signal": frozen.signal,
        "hapo_token_reward": frozen.token_reward,
    }
    data = TensorDict(
        {field: response_to_nested(x, lengths) for field, x in tokens.items() if x is not None}
        | {"hapo_reward": frozen.reward, "hapo_verdict": frozen.verdict, "hapo_group": frozen.group}
        | {"prompts": torch.nested.as_nested_tensor([torch.ones(PROMPT)] * ROWS, layout=torch.jagged)}
        | {"responses": lengths, "response_mask": lengths},
        batch_size=ROWS,
    )
    told = {k: v for k, v in method.options.items() if k != "method"}
    plan = RolloutPlan(name, told, 1, frozen.stats, None, 1.0, ROWS)
    counts = {"dp_size": 1, "batch_num_tokens": int(LENGTHS.sum()), "global_batch_size": ROWS}
    tu.assign_non_tensor(data, hapo=plan.to_dict(), **counts)

    actor: Any = object.__new__(HAPOActor)
    actor.engine = SimpleNamespace(get_data_parallel_group=lambda: None)
    actor.infer_batch = lambda ask: outputs_of(ask, batch)
    actor._method, actor._recorder, actor._verl_loss = None, None, partial(ppo_loss, CONFIG)
    actor._begin_step(data, actor.method(plan), plan)
    logp = batch.logp.clone().requires_grad_()
    loss = torch.zeros(())
    for rows in MICRO_BATCHES:
        micro = tu.index_select_tensor_dict(data, rows)
        outputs = outputs_of(micro, SimpleNamespace(logp=logp[rows], entropy=batch.entropy[rows]))
        loss = loss + actor._loss(outputs, micro)[0]
    (gradient,) = torch.autograd.grad(loss, logp)

    expected_at = batch.logp.clone().requires_grad_()
    step = method.step(prepared.replace(logp=batch.logp, entropy=batch.entropy))
    expected = method.loss(step.replace(logp=expected_at)).loss
    (expected_gradient,) = torch.autograd.grad(expected, expected_at)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    assert gradient.any()
