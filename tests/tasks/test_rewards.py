import logging
import threading

import numpy as np
import pytest
import torch

from hapo.tasks import GuardedReward, RewardError, load_rewards

PROMPTS = ["p0", "p1", "p2"]
COMPLETIONS = ["good", "bad", "good"]
hang = threading.Event()  # never set


@pytest.fixture(autouse=True, scope="module")
def release_hanging_threads():
    yield
    hang.set()


def raises(prompts, completions, **columns):
    if "bad" in completions:
        raise ZeroDivisionError("division by zero")
    return [1.0] * len(completions)


def hangs(prompts, completions, **columns):
    if "bad" in completions:
        hang.wait()
    return [1.0] * len(completions)


def too_few(prompts, completions, **columns):
    return [1.0 for completion in completions if completion == "good"]


def gives(value):
    return lambda prompts, completions, **columns: [value if c == "bad" else 1.0 for c in completions]


FAILURES = [
    (raises, "raised ZeroDivisionError: division by zero"),
    (hangs, r"did not return within 0\.5 s and cannot be stopped"),
    (too_few, "returned 0 values for 1 samples"),
    (gives(float("nan")), "returned nan, not a finite number,"),
    (gives("1.0"), r"returned '1\.0', not a finite number,"),
    (gives(None), "returned None, not a finite number,"),
    (gives(10**400), "returned 10+ .* 0+, not a finite number,"),
    (gives(torch.ones(2)), r"returned tensor\(\[1\., 1\.\]\), not a finite number,"),
]


def limit(function) -> float:
    """Seconds: few for what never returns, and enough on a busy machine for what does."""
    return 0.5 if function is hangs else 60.0


IDS = ["raises", "hangs", "wrong length", "NaN", "string", "None", "too large", "tensor"]


@pytest.mark.parametrize(("function", "message"), FAILURES, ids=IDS)
def test_a_failing_reward_is_an_error_that_names_the_sample(function, message):
    reward = GuardedReward(function, "mine", timeout=limit(function))
    place = r"on sample 1 of 3 \(counted from 0; prompt 'p1', completion 'bad'\).*set on_reward_error"
    with pytest.raises(RewardError, match=f"reward 'mine' {message} {place}"):
        reward(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=[[1], [2], [3]])


@pytest.mark.parametrize(("function", "message"), FAILURES, ids=IDS)
def test_failing_samples_score_as_told(caplog, function, message):
    reward = GuardedReward(function, "mine", timeout=limit(function), fallback=-0.5)
    with caplog.at_level(logging.WARNING):
        assert reward(prompts=PROMPTS, completions=COMPLETIONS) == [1.0, -0.5, 1.0]
    assert "reward 'mine' failed on 1 of 3 samples, which score -0.5" in caplog.text


def test_the_cause_is_kept():
    with pytest.raises(RewardError) as caught:
        GuardedReward(raises, "mine", timeout=60.0)(prompts=PROMPTS, completions=COMPLETIONS)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("result", [[1, True, 0.5], (1, 1, 0.5), np.array([1, 1, 0.5]), torch.tensor([1, 1, 0.5])])
def test_a_sound_reward_passes_and_sees_what_trl_gives_it(result):
    seen = {}

    def sound(prompts, completions, answer, log_metric, **columns):
        seen.update(answer=answer, log_metric=log_metric)
        return result

    reward = GuardedReward(sound, "mine", timeout=60.0)
    assert reward(prompts=PROMPTS, completions=COMPLETIONS, answer=["a", "b", "c"], log_metric=print) == [
        1.0,
        1.0,
        0.5,
    ]
    assert seen == {"answer": ["a", "b", "c"], "log_metric": print}


def test_a_failure_of_the_batch_alone_is_an_error_too():
    def whole(prompts, completions, **columns):
        return [1.0] if len(completions) == 1 else 1.0

    with pytest.raises(
        RewardError, match=r"returned 1\.0, not a list of numbers, on a batch of 3 samples, although"
    ):
        GuardedReward(whole, "mine", timeout=60.0)(prompts=PROMPTS, completions=COMPLETIONS)


def test_functions_are_found_by_file_and_by_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def length(prompts, completions, **columns):\n    return [len(c) for c in completions]\n"
        "async def later(prompts, completions, **columns):\n    return []\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = ["my_rewards:length", "./my_rewards.py:length", "exact", "auto"]
    rewards = load_rewards(names, raises, 1.0, None)
    assert [r.__name__ for r in rewards] == ["length", "length", "exact_reward", "raises"]
    assert (
        rewards[0](prompts=["p"], completions=["four"]) == rewards[1](prompts=["p"], completions=["four"]) == [4.0]
    )


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("math-verify", ValueError, r"unknown reward 'math-verify' \(did you mean math_verify\?\); choose from auto, exact"),
        ("no_such_module:fn", ValueError, r"No module named 'no_such_module'\. For a file .* write path/to/file\.py:fn"),
        ("json:dump_", ValueError, r"json has no function 'dump_' \(did you mean dumps?, dumps?\?\)"),
        ("nowhere/a.py:fn", FileNotFoundError, "reward 'nowhere/a.py:fn': no file .*nowhere/a.py"),
        ("asyncio:sleep", ValueError, "reward 'asyncio:sleep' is async; give a plain function"),
    ],
)  # fmt: skip
def test_unknown_rewards_are_refused(name, error, message):
    with pytest.raises(error, match=message):
        load_rewards([name], raises, 1.0, None)
