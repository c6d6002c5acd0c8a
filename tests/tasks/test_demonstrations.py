"""Demonstrations of a task: read as its problems are, none of them of an evaluation question."""

import logging

import pytest

from hapo.tasks import TaskConfig, load_task
from tests.tasks.test_data import jsonl, sums


def task_of(tmp_path, shown, **options):
    told = {"dataset": jsonl(tmp_path / "a.jsonl", sums(range(6))), "eval_size": 2, "rewards": ["exact"]}
    return load_task(
        TaskConfig(**{**told, "demonstrations": jsonl(tmp_path / "shown.jsonl", shown), **options}), seed=0
    )


def worked(numbers):
    return [{"question": f"what is  {i} + 1?", "solution": f"One more than {i}: {i + 1}"} for i in numbers]


def test_they_are_put_as_the_problems_are_and_evaluation_questions_are_left_out(tmp_path, caplog):
    template = "{question} Think."
    with caplog.at_level(logging.WARNING):
        task = task_of(tmp_path, worked(range(6)), completion_column="solution", prompt_template=template)
    assert "dropped 2 of 6 demonstrations whose questions are evaluation questions" in caplog.text
    asked = {" ".join(q.lower().split()) for q in task.eval["question"]}
    shown = {" ".join(q.lower().split()) for q in task.demonstrations["question"]}
    assert len(shown) == 4 and not shown & asked
    row = task.demonstrations[0]
    assert row["prompt"] == row["question"] + " Think." and row["completion"].startswith("One more")
    chat = {"chat": True, "system_prompt": "Be brief.", "demonstration_size": 3}
    task = task_of(tmp_path, worked(range(6)), completion_column="solution", **chat)
    assert len(task.demonstrations) == 3
    assert [m["role"] for m in task.demonstrations[0]["prompt"]] == ["system", "user"]


def test_messages_end_with_the_answer(tmp_path):
    said = [{"role": "user", "content": "7?"}, {"role": "assistant", "content": "8"}]
    task = task_of(tmp_path, [{"messages": said}])
    assert task.demonstrations[0] == {"prompt": said[:1], "completion": said[1:], "question": "7?"}


def test_worked_sums_are_embedded_and_answer_no_evaluation_problem():
    config = TaskConfig(train_size=8, eval_size=8, demonstrations="addition", demonstration_size=5)
    task = load_task(config, seed=0)
    assert len(task.demonstrations) == 5
    row = task.demonstrations[0]
    total = sum(map(int, row["question"].split("+")))
    assert row["prompt"] == row["question"] + "=" and row["completion"].endswith(f";{total}")
    assert not {*task.demonstrations["question"]} & {*task.eval["question"]}
    assert load_task(config.without_demonstrations(), seed=0).demonstrations is None


@pytest.mark.parametrize(
    ("shown", "options", "message"),
    [
        ([{"question": "7?", "text": "8"}], {}, "none of the columns 'messages' and 'completion', but 'question', 'text'. Set"),
        ([{"question": "7?", "completion": " "}], {}, "row 1: the completion must be text or messages, got ' '"),
        ([{"question": "7?", "completion": 8}], {}, "row 1: the completion must be text or messages, got 8"),
        ([{"messages": [{"role": "user", "content": "7?"}]}], {}, "row 1: a demonstration is a list of messages that ends"),
        ([{"messages": [{"role": "assistant", "content": "8"}]}], {}, "beside rollouts needs a question"),
        ([], {}, "no rows"),
        (worked(range(6)), {"completion_column": "solution", "demonstration_size": 5}, "demonstration_size is 5, but"),
        (worked([2] * 3), {"completion_column": "solution", "eval_size": 5}, "all are evaluation questions"),
        ([], {"demonstrations": "reasoning_gym:chain_sum"}, "has no answers in full"),
        ([], {"demonstrations": None, "demonstration_size": 5}, "demonstration_size=5 needs demonstrations"),
    ],
)  # fmt: skip
def test_what_is_no_demonstration_is_named(tmp_path, shown, options, message):
    with pytest.raises(ValueError, match=message):
        task_of(tmp_path, shown, **options)


def test_a_flag_takes_back_what_a_recipe_says():
    config = TaskConfig(demonstrations="none", demonstration_size=5)
    assert (config.demonstrations, config.demonstration_size) == (None, None)
