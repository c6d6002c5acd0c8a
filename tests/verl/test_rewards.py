"""Scores by token: what the reward manager sends, where it arrives in both trainers, and who is told that it sums."""

import asyncio
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from verl import DataProto
from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls

import hapo
from hapo.engines.verl.columns import ProtoColumns
from hapo.engines.verl.driver import Driver
from hapo.engines.verl.rewards import packed, unpacked

IDS, LENGTH = [7, 8, 9, 0], 3
"""The last is padding."""


def returned(value: Any) -> dict[str, Any]:
    """What the manager sends of a response, for which the reward function returns this."""
    manager: Any = object.__new__(get_reward_manager_cls("hapo_tokens"))

    async def score(extra_info: dict[str, Any], **others: Any) -> Any:
        assert extra_info["response_ids"] == IDS[:LENGTH] and extra_info["index"] == 3
        return value

    manager.compute_score, manager.is_async_reward_score, manager.reward_router_address = score, True, None
    manager.tokenizer = SimpleNamespace(decode=lambda ids, **others: "text")
    mask = torch.tensor([[1, 1, *(int(i < LENGTH) for i in range(len(IDS)))]])
    data = DataProto(
        TensorDict({"responses": torch.tensor([IDS]), "attention_mask": mask}, batch_size=1),
        {
            "data_source": np.array(["addition"], dtype=object),
            "reward_model": np.array([{"ground_truth": ""}], dtype=object),
            "extra_info": np.array([{"index": 3}], dtype=object),
        },
    )

    async def run() -> Any:
        manager.loop = asyncio.get_running_loop()
        return await manager.run_single(data)

    return asyncio.run(run())


def test_a_list_is_summed_for_verl_and_sent_beside() -> None:
    scores = [0.25, 0.0, -1.5]
    for value in (scores, np.array(scores), {"score": scores, "acc": 1.0}):
        sent = returned(value)
        infos = sent["reward_extra_info"]
        assert sent["reward_score"] == -1.25 and unpacked(infos["token_scores"]).tolist() == scores
        assert infos["acc"] == (1.0 if isinstance(value, dict) else -1.25)
        assert all(
            isinstance(info, float | str) for info in infos.values()
        )  # what verl averages, and what it skips


def test_a_number_is_verls_own() -> None:
    assert returned(0.5) == {"reward_score": 0.5, "reward_extra_info": {"acc": 0.5, "token_scores": ""}}


@pytest.mark.parametrize("value", [[0.5], [0.5, None, 1.0], [0.5, float("nan"), 1.0]])
def test_a_wrong_list(value: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"returned .*one finite number for each id of extra_info\[.response_ids"):
        returned(value)


def batch_of(infos: list[str]) -> ProtoColumns:
    """Three responses of 4, 2 and 3 tokens, each with its number on its last token."""
    mask = torch.arange(4) < torch.tensor([[4], [2], [3]])
    scores = torch.zeros(3, 4)
    scores[torch.arange(3), torch.tensor([3, 1, 2])] = torch.tensor([1.0, 2.0, 3.0])
    batch = TensorDict({"response_mask": mask.long(), "rm_scores": scores}, batch_size=3)
    told = {"reward_extra_keys": ["token_scores"]}
    return ProtoColumns(DataProto(batch, {"token_scores": np.array(infos)}, told))


def place(columns: ProtoColumns, **options: Any) -> torch.Tensor:
    method = hapo.method("dapo", **options)
    Driver.place_scores(SimpleNamespace(method=method, _said=False), columns)  # type: ignore[arg-type]
    return columns.read("rm_scores")["rm_scores"]


def test_scores_stand_on_their_tokens() -> None:
    """A row of a number keeps it; padding stays 0."""
    columns = batch_of([packed([0.5, 0.0, 0.0, 0.5]), packed([-1.0, 3.0]), ""])
    placed = place(columns, advantage="token_reward")
    assert placed.tolist() == [[0.5, 0.0, 0.0, 0.5], [-1.0, 3.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]]


def test_methods_of_outcomes_say_that_they_sum() -> None:
    """Once where scores are dense; nothing where each response has its number on its last token."""
    with pytest.warns(UserWarning, match=r"takes the sum: \+hapo.options.advantage=token_reward"):
        place(batch_of([packed([0.5, 0.0, 0.0, 0.5]), "", ""]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        place(batch_of(["", "", ""]))
        place(batch_of([packed([0.0, 0.0, 0.0, 0.5]), "", ""]))
        place(batch_of([packed([0.5, 0.0, 0.0, 0.5]), "", ""]), advantage="token_reward")
