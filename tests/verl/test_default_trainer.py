"""The default trainer's advantage and update, verl's own code around hapo's, in this process: the queue is a dictionary.

Whole runs (test_replay.py) prove the rest; this says in seconds what of it broke.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import trainer_base
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import response_to_nested

import hapo
from hapo.engines.verl import queue
from hapo.engines.verl.config import Settings
from hapo.engines.verl.rewards import packed
from hapo.engines.verl.trainer import HAPOTrainerSync
from tests.verl.test_columns import Memory, meta_of
from tests.verl.test_refusals import compose

LENGTHS, WIDTH = torch.tensor([4, 1, 3, 2]), 4
MASK = torch.arange(WIDTH) < LENGTHS.unsqueeze(1)
NESTED = torch.nested.as_nested_tensor([torch.ones(n, dtype=torch.long) for n in LENGTHS], layout=torch.jagged)
KEYS = ["a_0_0", "a_1_0", "b_0_0", "b_1_0"]
BY_TOKEN = [[0.5, 0.0, 0.25, 0.0], [1.0], [0.0, 2.0, 0.0], [0.25, 0.25]]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """A rollout with old and sampler's log-probs and entropies, each response's sum on its last token."""
    generator = torch.Generator().manual_seed(0)
    last = torch.zeros(4, WIDTH)
    last[torch.arange(4), LENGTHS - 1] = torch.tensor([sum(row) for row in BY_TOKEN])
    columns = {
        "rm_scores": last,
        "old_log_probs": -torch.rand(4, WIDTH, generator=generator),
        "rollout_log_probs": -torch.rand(4, WIDTH, generator=generator),
        "entropy": torch.rand(4, WIDTH, generator=generator),
    }
    infos = [{"reward_extra_info": {"token_scores": packed(row)}} for row in BY_TOKEN]
    fields: dict[str, Any] = {name: response_to_nested(x, NESTED) for name, x in columns.items()}
    fields |= {"response_mask": NESTED, "extra_fields": infos, "uid": [key[0] for key in KEYS]}
    made = Memory(tu.get_tensordict(fields))
    monkeypatch.setattr(queue, "transfer_queue", made)
    monkeypatch.setattr(trainer_base, "tq", made)
    return made


def trainer_of(method: hapo.Method, tmp_path: Any) -> Any:
    """Without what its constructor starts."""
    trainer: Any = object.__new__(HAPOTrainerSync)
    trainer.config = compose(tmp_path, "+hapo.method=hapo")
    trainer.settings = Settings.of(OmegaConf.to_container(trainer.config))  # type: ignore[arg-type]
    trainer.method, trainer.records, trainer.global_steps, trainer._steps = method, None, 1, 5
    trainer.temperature_stats = trainer._sampled_with = trainer._plan = None
    trainer._said = False
    return trainer


def test_advantage_and_update(memory: Memory, tmp_path: Any) -> None:
    method = hapo.method("hapo", advantage="token_reward", sampler_cap=2.0, filter_groups=False)
    trainer = trainer_of(method, tmp_path)
    metrics: dict[str, Any] = {}
    batch = trainer._compute_advantage(meta_of(KEYS), metrics)

    rewards = torch.tensor([row + [0.0] * (WIDTH - len(row)) for row in BY_TOKEN])
    found = {
        name: memory.fields[name].to_padded_tensor(0.0)
        for name in ("rm_scores", "old_log_probs", "rollout_log_probs", "entropy", "advantages", "hapo_signal")
    }
    assert found["rm_scores"].equal(rewards)
    expected = method.prepare(
        hapo.TokenBatch(
            mask=MASK,
            old_logp=found["old_log_probs"],
            old_entropy=found["entropy"],
            sampler_logp=found["rollout_log_probs"],
            token_reward=rewards,
            reward=rewards.sum(1),
            verdict=rewards.sum(1),
            group=torch.tensor([0, 0, 1, 1]),
        )
    )
    assert expected.advantage is not None and expected.signal is not None and expected.weight is not None
    torch.testing.assert_close(found["advantages"], expected.advantage * MASK)
    torch.testing.assert_close(found["hapo_signal"], expected.signal * MASK)
    weight = memory.fields["rollout_is_weights"].to_padded_tensor(0.0)
    torch.testing.assert_close(weight, expected.weight * MASK)
    assert memory.fields["hapo_token_reward"].to_padded_tensor(0.0).equal(rewards)
    assert memory.fields["hapo_group"].tolist() == [0, 0, 1, 1] and trainer.temperature_stats == expected.stats
    assert metrics["hapo/entropy_stats/pivot"] == pytest.approx(expected.stats.pivot)

    seen: list[Any] = []

    def update_actor(sent: Any) -> dict[str, Any]:
        seen.append(sent.extra_info["hapo"])
        return {"metrics": {"loss": [0.5], "mfu": [0.0], "hapo/ratio/mean": [1.25]}}

    batch.extra_info = getattr(batch, "extra_info", {})
    trainer.actor_rollout_wg = SimpleNamespace(update_actor=update_actor)
    trainer.config.actor_rollout_ref.actor.ppo_mini_batch_size = 1
    trainer.config.actor_rollout_ref.rollout.n = 2
    trainer._update_actor(batch, metrics)
    assert seen[0]["step"] == 6 and seen[0]["responses"] == 3  # the key of the last row says that verl added it
    assert seen[0]["stats"]["pivot"] == expected.stats.pivot
    assert metrics["hapo/ratio/mean"] == 1.25 and trainer._steps == 5 + 2 * 3  # two mini-batches, three epochs
    assert np.isclose(metrics["actor/loss"], 0.5)
