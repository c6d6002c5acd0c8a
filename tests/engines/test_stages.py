"""The order of a curriculum: shares of the training, one stage a rollout batch, shuffled inside, fresh prompts."""

from collections import Counter
from types import SimpleNamespace

import pytest
from datasets import Dataset
from trl.trainer.utils import RepeatSampler

from hapo.engines.trl.rollout import FreshPrompts
from hapo.engines.trl.stages import Stages, StageSampler


def rows(values: list) -> Dataset:
    return Dataset.from_dict({"prompt": [f"{i}?" for i in range(len(values))], "level": values})


STAGES = [3, 1, 1, 3, 1, 1, 3, 1, 1, 1, 3, 1]  # eight of 1, four of 3


def order_of(stages: Stages, batches: int, size: int = 2, seed: int | None = 0) -> list[list[int]]:
    return [stages.batch(number, batches, size, seed) for number in range(batches)]


def test_each_stage_gets_its_share_and_goes_through_its_prompts():
    stages = Stages(rows(STAGES), "level")
    batches = order_of(stages, 12)
    levels = [{STAGES[row] for row in batch} for batch in batches]
    assert levels == [{1}] * 8 + [{3}] * 4
    for turn in (batches[:4], batches[4:8]):
        assert sorted(row for batch in turn for row in batch) == stages.rows[0]
    assert batches[:4] != batches[4:8] and [row for batch in batches[:4] for row in batch] != stages.rows[0]
    assert order_of(stages, 12, seed=1) != batches == order_of(stages, 12)
    assert order_of(stages, 12, seed=None)[:4] == [[1, 2], [4, 5], [7, 8], [9, 11]]


def test_the_largest_first_and_stages_smaller_than_a_batch():
    stages = Stages(rows(STAGES), "-level")
    assert [STAGES[batch[0]] for batch in order_of(stages, 3)] == [3, 1, 1]
    small = Stages(rows([1, 2, 2, 1, 2, 2]), "level")
    batches = order_of(small, 6, size=3)
    assert Counter(batches[0] + batches[1]) == {0: 3, 3: 3}
    assert all(len(set(batch)) == 3 for batch in batches[2:])


def test_the_sampler_repeats_as_trls_does_and_goes_on_in_the_next_epoch():
    data = rows(STAGES)
    template = RepeatSampler(data, mini_repeat_count=2, batch_size=4, repeat_count=3, seed=5)
    state = SimpleNamespace(max_steps=12, epoch=0.0, global_step=0)
    trainer = SimpleNamespace(state=state, args=SimpleNamespace(updates_per_rollout=2))
    stages = Stages(data, "level")
    sampler = StageSampler(template, stages, trainer)
    drawn = []
    for state.epoch in (0.0, 1.0):
        epoch = list(sampler)
        assert len(epoch) == len(list(template)) == len(sampler)
        drawn += [epoch[i : i + 24] for i in range(0, len(epoch), 24)]
    for number, batch in enumerate(drawn):
        expected = stages.batch(number, 6, 4, 5)
        assert batch == [row for row in expected for _ in range(2)] * 3
    assert [STAGES[batch[0]] for batch in drawn] == [1, 1, 1, 1, 3, 3]


def test_a_training_too_short_for_all_stages_says_so(caplog):
    data = rows([1] * 20 + [2])
    trainer = SimpleNamespace(
        state=SimpleNamespace(max_steps=3, epoch=0, global_step=0), args=SimpleNamespace(updates_per_rollout=1)
    )
    list(StageSampler(RepeatSampler(data, 1, 2, seed=0), Stages(data, "level"), trainer))
    assert "3 rollout batches have none for stage 2: raise max_steps" in caplog.text


def test_fresh_prompts_are_of_the_stage_that_asks():
    data = rows(STAGES)
    stages = Stages(data, "level")
    fresh = FreshPrompts(data, seed=0, stages=stages)
    used: Counter[str] = Counter()
    assert {row["level"] for row in fresh.take(3, used)} == {1}
    assert {row["level"] for row in fresh.take(4, used, stage=1)} == {3}
    assert fresh.take(1, used, stage=1) == []  # all four are used
    assert len(fresh.take(9, used)) == 5
    again = FreshPrompts(data, 0, position=fresh.position, stages=stages)
    assert again.take(4, Counter()) == fresh.take(4, Counter())


@pytest.mark.parametrize(
    ("data", "column", "message"),
    [
        (rows([1]), "stage", "no such column; they have prompt, level"),
        (rows([1.5]), "level", r"row 0: a stage is a whole number, not 1\.5"),
        (rows([1, None]), "-level", "row 1: a stage is a whole number, not None"),
        (iter([]), "level", "a stream has none"),
    ],
)
def test_what_is_no_column_of_stages(data, column, message):
    with pytest.raises(ValueError, match=message):
        Stages(data, column)
