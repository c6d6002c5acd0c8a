"""Addition column by column, and what an environment has to have."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from transformers.utils import get_json_schema

from hapo.tasks.addition import held_out, solution
from hapo.tasks.environments import Environment, load_environment, tool_of
from hapo.tasks.environments.addition import AdditionEnvironment

ROW = {"prompt": "347+586=", "question": "347+586", "answer": "933"}
TURNS = ["7+6=13;", "4+8+1=13;", "3+5+1=9;", "933"]


def begun() -> AdditionEnvironment:
    environment = AdditionEnvironment()
    assert environment.done and environment.reset(**ROW) is None
    return environment


def test_right_columns_and_the_right_sum():
    environment = begun()
    assert environment.max_turns == 4
    for turn in TURNS[:-1]:
        assert environment.answer(turn) == "" and not environment.done and environment.reward == 0
    assert environment.answer(TURNS[-1]) == "" and environment.done and environment.reward == 1
    assert environment.get_reward() == 1
    environment.reset(**ROW)
    assert environment.reward == 0 and not environment.done


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(
    "wrong", ["", ";", "7+6=13", "933;", "0933", "933 ", "6+7=13;", "7+6=13;4+8+1=13;", "\u0663"]
)
def test_any_other_turn_ends_the_episode_without_a_reward(place, wrong):
    environment = begun()
    for turn in TURNS[:place]:
        environment.answer(turn)
    environment.answer(wrong)
    assert environment.done and environment.reward == 0
    with pytest.raises(RuntimeError, match="call reset"):
        environment.answer(TURNS[place])


def test_every_turn_is_one_of_the_worked_answer():
    task = load_environment("addition", seed=3, train_size=50, eval_size=20)
    for row in [*task.train, *task.eval]:
        environment = task.make()
        environment.reset(**row)
        a, b = (int(x) for x in row["question"].split("+"))
        *columns, total = solution(a, b).split(";")
        rewards = []
        for turn in [*(f"{column};" for column in columns), total]:
            tool_of(environment)(turn)
            rewards.append(environment.reward)
        assert rewards == [0.0] * len(columns) + [1.0] and environment.done
    assert all(held_out(*(int(x) for x in row["question"].split("+"))) for row in task.eval)


def test_it_is_an_environment_and_its_tool_has_a_schema():
    environment = AdditionEnvironment()
    assert isinstance(environment, Environment) and tool_of(environment) == environment.answer
    schema = get_json_schema(environment.answer)["function"]
    assert schema["name"] == "answer" and schema["parameters"]["required"] == ["text"]
    public = {name for name, _ in inspect.getmembers(AdditionEnvironment, inspect.isfunction) if name[0] != "_"}
    assert public == {"reset", "answer", "get_reward"}


def test_what_is_no_environment_is_named():
    class Two(AdditionEnvironment):
        def hint(self) -> str:
            return ""

    class Without:
        def reset(self, **row: Any) -> None:
            pass

    with pytest.raises(TypeError, match="Two has the public methods answer, hint beside reset"):
        tool_of(Two())
    with pytest.raises(TypeError, match="Without has no reward, done, max_turns"):
        tool_of(Without())  # type: ignore[arg-type]
