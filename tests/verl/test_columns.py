"""A rollout batch through both kinds of columns: the same numbers are read of it, and come to its actors."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from verl import DataProto
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import response_to_nested

import hapo.verl_cpu  # noqa: F401 - registers the platform before verl asks for it
from hapo.engines.verl import queue
from hapo.engines.verl.columns import Columns, ProtoColumns, like, prompts_of
from hapo.engines.verl.queue import QueueColumns

LENGTHS, WIDTH = torch.tensor([4, 1, 3]), 5
MASK = torch.arange(WIDTH) < LENGTHS.unsqueeze(1)
SCORES = torch.arange(15.0).view(3, WIDTH) * MASK
ACC = [0.0, 1.0, 0.5]
NESTED = torch.nested.as_nested_tensor([torch.ones(n) for n in LENGTHS], layout=torch.jagged)


class Memory:
    """TransferQueue's two calls, as verl's trainer makes them, on a dictionary."""

    def __init__(self, fields: TensorDict) -> None:
        self.fields = fields

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> TensorDict:
        return self.fields.select(*(name for name in select_fields if name in self.fields.keys()))  # noqa: SIM118

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: TensorDict) -> Any:
        self.fields.update(fields)
        return meta_of(keys)


class Meta(SimpleNamespace):
    """verl's handle on rows of the queue."""

    def __len__(self) -> int:
        return len(self.keys)


def meta_of(keys: list[str]) -> Any:
    """Of a batch; verl itself added c and the second session of b, to fill its ranks."""
    tags = [{"is_padding": key.startswith(("c", "b_1"))} for key in keys]
    return Meta(keys=keys, partition_id="train", extra_info={}, tags=tags)


@pytest.fixture
def in_queue(monkeypatch: pytest.MonkeyPatch) -> QueueColumns:
    scores = response_to_nested(SCORES, NESTED)
    extra = [{"reward_extra_info": {"acc": acc}} for acc in ACC]
    fields = tu.get_tensordict({"response_mask": NESTED, "rm_scores": scores, "extra_fields": extra})
    monkeypatch.setattr(queue, "transfer_queue", Memory(fields))
    return QueueColumns(meta_of(["a_0_0", "b_0_0", "c_0_0"]))


@pytest.fixture
def in_proto() -> ProtoColumns:
    batch = TensorDict({"response_mask": MASK.float(), "rm_scores": SCORES.clone()}, batch_size=3)
    return ProtoColumns(DataProto(batch, {"acc": np.array(ACC)}, {"reward_extra_keys": ["acc"]}))


@pytest.mark.parametrize("kind", ["in_queue", "in_proto"])
def test_columns(request: pytest.FixtureRequest, kind: str) -> None:
    columns: Columns = request.getfixturevalue(kind)
    given = columns.read("response_mask", "rm_scores", "ref_log_prob")
    width = given["rm_scores"].shape[1]
    assert sorted(given) == ["response_mask", "rm_scores"]  # there is no reference model
    assert given["rm_scores"].equal(SCORES[:, :width]) and given["response_mask"].bool().equal(MASK[:, :width])
    assert columns.infos() == [{"acc": acc} for acc in ACC]
    assert columns.added.tolist() == [False, False, kind == "in_queue"]
    columns.write({"rm_scores": 2 * given["rm_scores"], "hapo_group": torch.tensor([0, 0, 1])})
    again = columns.read("rm_scores", "hapo_group")
    assert again["rm_scores"].equal(2 * SCORES[:, :width]) and again["hapo_group"].tolist() == [0, 0, 1]
    columns.tell("hapo", {"step": 3})
    batch: Any = columns
    told = batch.batch.extra_info if kind == "in_queue" else batch.batch.meta_info
    assert told["hapo"] == {"step": 3}


def test_sessions_of_several_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match="session in several outputs .a_0_1.*: return one output a session"):
        QueueColumns(meta_of(["a_0_0", "a_0_1"]))


def test_layouts_of_an_actor() -> None:
    """Rows of their own length with the queue, padded without it."""
    x = torch.arange(12.0).view(3, 4)
    assert [row.tolist() for row in like(x, NESTED).unbind()] == [[0, 1, 2, 3], [4], [8, 9, 10]]
    assert like(x, MASK).tolist() == torch.nn.functional.pad(x, (0, 1)).tolist()
    rows = [[1, 2], [3]]
    nested = torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)
    padded = {"prompts": torch.tensor([[1, 2], [0, 3]]), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    for data in (TensorDict({"prompts": nested}, batch_size=2), TensorDict(padded, batch_size=2)):
        assert [row.tolist() for row in prompts_of(data)] == rows
