import asyncio
import functools
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
    (gives(float("nan")), "returned nan, not a finite number or None,"),
    (gives("1.0"), r"returned '1\.0', not a finite number or None,"),
    (gives(10**400), "returned 10+ .* 0+, not a finite number or None,"),
    (gives(torch.ones(2)), "returned a list of 2 for a completion of 1 tokens"),
    (gives([float("nan")]), "returned nan for token 0 of 1, not a finite number"),
]


def limit(function) -> float:
    """Seconds: few for what never returns, and enough on a busy machine for what does."""
    return 0.5 if function in (hangs, hangs_later) else 60.0


async def hangs_later(prompts, completions, **columns):
    while "bad" in completions:
        await asyncio.sleep(0.01)
    return [1.0] * len(completions)


async def raises_later(prompts, completions, **columns):
    await asyncio.sleep(0)
    return raises(prompts, completions)


async def exits_later(prompts, completions, **columns):
    if "bad" in completions:
        raise SystemExit("enough")
    return [1.0] * len(completions)


FAILURES += [
    (hangs_later, r"did not return within 0\.5 s and cannot be stopped"),
    (raises_later, "raised ZeroDivisionError: division by zero"),
    (exits_later, "raised SystemExit: enough"),
]
IDS = [
    "raises",
    "hangs",
    "wrong length",
    "NaN",
    "string",
    "too large",
    "length of a list",
    "NaN in a list",
    "async hangs",
    "async raises",
    "async exits",
]


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


def test_none_says_that_a_reward_does_not_apply():
    """With and without a fallback: it is no failure."""
    for fallback in (None, -0.5):
        reward = GuardedReward(gives(None), "mine", timeout=60.0, fallback=fallback)
        assert reward(prompts=PROMPTS, completions=COMPLETIONS) == [1.0, None, 1.0]


@pytest.mark.parametrize("given", [[0.5, 1, True], (0.5, 1, 1), np.array([0.5, 1, 1]), torch.tensor([0.5, 1, 1])])
def test_a_list_is_a_reward_per_token(given):
    reward = GuardedReward(gives(given), "mine", timeout=60.0, fallback=-0.5)
    ids = [[1], [2, 3, 4], [5, 6]]
    assert reward(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=ids) == [1.0, [0.5, 1.0, 1.0], 1.0]


class Client:
    """An async callable object that keeps what belongs to its first loop, as an HTTP client does."""

    def __init__(self):
        self.lock = None

    async def __call__(self, prompts, completions, **columns):
        self.lock = self.lock or (asyncio.get_running_loop(), asyncio.Lock())
        assert self.lock[0] is asyncio.get_running_loop()

        async def score(text):
            async with self.lock[1]:
                await asyncio.sleep(0.001)
            return None if text == "bad" else 1.0

        return await asyncio.gather(*map(score, completions))


@pytest.mark.parametrize("wrapped", [Client(), functools.partial(Client()), lambda **batch: Client()(**batch)])
def test_async_rewards_are_awaited_in_one_loop(wrapped):
    reward = GuardedReward(wrapped, "mine", timeout=60.0)
    for _ in range(2):
        assert reward(prompts=PROMPTS, completions=COMPLETIONS) == [1.0, None, 1.0]


def test_an_async_reward_that_blocks_its_loop_does_not_hold_up_the_next_call():
    calls = []

    async def blocks_once(prompts, completions, **columns):
        calls.append(completions)
        if len(calls) == 1:
            hang.wait()
        return [1.0] * len(completions)

    reward = GuardedReward(blocks_once, "mine", timeout=0.5, fallback=0.0)
    assert reward(prompts=["p"], completions=["c"]) == [1.0]  # scored alone after the time-out
    assert len(calls) == 2


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
        "async def later(prompts, completions, **columns):\n    return [None] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (later,) = load_rewards(["my_rewards:later"], raises, 60.0, None)
    assert later(prompts=["p"], completions=["four"]) == [None]
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
    ],
)  # fmt: skip
def test_unknown_rewards_are_refused(name, error, message):
    with pytest.raises(error, match=message):
        load_rewards([name], raises, 1.0, None)
