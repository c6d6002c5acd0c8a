"""Rewards: exact match, math-verify, or a function of one's own behind a guard.

All have TRL's signature, ``fn(prompts, completions, completion_ids, **columns) -> list[float | None]``;
completions are texts or lists of messages. A function of one's own may give a completion a list in the place of a
number, a reward for each of its `completion_ids`; its outcome is the sum. Several rewards are weighted by TRL's
`reward_weights`; None says that a reward does not apply to a sample, whose other rewards then count alone.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import difflib
import importlib
import importlib.util
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from .answers import Completion, normalise, text_of
from .maths import MathReward
from .per_token import fault, is_number, tokens_of
from .reading import canonical_number, gold_text
from .stated import extract_answer, unwrap
from .verifier import Judge

logger = logging.getLogger(__name__)

Reward = float | list[float] | None
RewardFunction = Callable[..., Sequence[Reward]]

BUILT_IN = ("auto", "exact", "math_verify", "reward_model")


class RewardError(RuntimeError):
    """A reward function failed, or returned what is no reward; the message names the sample."""


def exact_reward(
    prompts: list[Any], completions: list[Completion], answer: list[str], **columns: Any
) -> list[float]:
    """1.0 where completion and gold have the same final answer, else 0.0.

    Both go through `extract_answer`. White space and case do not count, nor does how a number is written (5.0,
    1,234 and 3e-05 are 5, 1234 and 0.00003); everything else does.
    """
    return [
        float(_content(text_of(completion)) == _content(gold_text(gold)))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def _content(text: str) -> str:
    answer = unwrap(extract_answer(text))
    return canonical_number(answer) or normalise(answer)


def math_verify_reward(timeout: float) -> MathReward:
    r"""Reward by math-verify: 1.0 where the completion's answer equals the gold answer as mathematics.

    Gold answer and completion go through `extract_answer`; of a completion that states no answer math-verify
    takes the last expression. Numbers are compared with their units, percentages, clock times and letters of
    choices as what they are (see MathReward), all else by math-verify. `timeout` is in seconds an answer; see
    VerifiedReward for answers that exceed it.
    """
    return MathReward(Judge("math_verify", timeout))


Result = float | list[float] | RewardError | None


class GuardedReward:
    """A user's reward function, behind checks that turn every failure into an error or into a chosen score.

    A failure is an exception, a call that lasts longer than `timeout` seconds times the number of samples, a
    result that is no list of one finite number, or None, a sample, or of one for each of its tokens. With
    `fallback` None it raises RewardError naming the sample; with a number, the failing samples get that score and
    a warning counts them. After a failure of the call as a whole the samples are scored one at a time to find
    those at fault, so a function that compares samples of a batch should go without `fallback`.

    The function runs in a daemon thread, because a hanging one cannot be stopped from outside and must not
    keep a failed training alive. Devices are a matter of the thread: on several GPUs name the device. An async
    function is awaited in an event loop of its own, the same one at every call, so that it may keep a client.
    """

    def __init__(
        self, function: Callable[..., Any], name: str, timeout: float, fallback: float | None = None
    ) -> None:
        self.__name__ = name
        self._function = function
        self._timeout = timeout
        self._fallback = fallback
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, prompts: list[Any], completions: list[Completion], **columns: Any) -> list[Reward]:
        """Score a batch; raises RewardError for the first sample that fails, unless there is a fallback."""
        batch = {"prompts": prompts, "completions": completions, **columns}
        size = len(completions)
        results = self._results(batch, size)
        if isinstance(results, RewardError):
            results = self._one_by_one(batch, size, results)
        failures = [i for i, result in enumerate(results) if isinstance(result, RewardError)]
        if failures and self._fallback is None:
            first = failures[0]
            failure = results[first]
            assert isinstance(failure, RewardError)
            raise RewardError(
                f"reward {self.__name__!r} {failure} on sample {first} of {size} "
                f"(counted from 0; {_describe(batch, first)}). Repair the function, or set on_reward_error to "
                "the score that such samples should get."
            ) from failure.__cause__
        if failures:
            logger.warning(
                "reward %r failed on %d of %d samples, which score %g (the first: %s)",
                self.__name__, len(failures), size, self._fallback, results[failures[0]],
            )  # fmt: skip
        return [self._fallback if isinstance(result, RewardError) else result for result in results]

    def _one_by_one(self, batch: dict[str, Any], size: int, error: RewardError) -> list[Result]:
        results: list[Result] = []
        for i in range(size):
            alone = self._results(_row(batch, i, size), 1)
            results.append(alone if isinstance(alone, RewardError) else alone[0])
            if isinstance(results[-1], RewardError) and self._fallback is None:
                return results
        if self._fallback is None:
            raise RewardError(
                f"reward {self.__name__!r} {error} on a batch of {size} samples, although it scores each of "
                f"them alone; the first: {_describe(batch, 0)}"
            )
        return results

    def _results(self, batch: dict[str, Any], size: int) -> list[Result] | RewardError:
        """One number or failure a sample, or the failure of the call."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def call() -> None:
            try:
                result = self._function(**batch)
                future.set_result(self._await(result) if inspect.isawaitable(result) else result)
            except BaseException as error:  # SystemExit, too, is a failure of the reward
                future.set_exception(error)

        limit = self._timeout * size
        threading.Thread(target=call, name=f"reward {self.__name__}", daemon=True).start()
        concurrent.futures.wait([future], timeout=limit)
        if not future.done():
            self._loop = None  # what hangs in it must not hold up the next call
            return RewardError(f"did not return within {limit:g} s and cannot be stopped")
        error = future.exception()
        if error is not None:
            failure = RewardError(f"raised {type(error).__name__}: {error}")
            failure.__cause__ = error
            return failure
        values = future.result()
        if hasattr(values, "tolist"):
            values = values.tolist()
        if not isinstance(values, (list, tuple)):
            return RewardError(f"returned {_excerpt(values)}, not a list of numbers,")
        if len(values) != size:
            return RewardError(f"returned {len(values)} values for {size} samples")
        ids = batch.get("completion_ids")
        return [_result(value, None if ids is None else len(ids[i])) for i, value in enumerate(values)]

    def _await(self, result: Awaitable[Any]) -> Any:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name=f"loop of {self.__name__}", daemon=True).start()
        value, error = asyncio.run_coroutine_threadsafe(_outcome(result), self._loop).result()
        if error is not None:
            raise error
        return value


async def _outcome(result: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """Value and error: raised inside of a loop, SystemExit would end the loop and reach nobody."""
    try:
        return await result, None
    except BaseException as error:
        return None, error


def _result(value: Any, length: int | None) -> Result:
    if value is None:
        return None
    if is_number(value):
        return float(value)
    tokens = tokens_of(value)
    if tokens is None:
        return RewardError(f"returned {_excerpt(value)}, not a finite number or None,")
    if length is None:
        return RewardError("returned a list of rewards per token, and the call has no completion_ids to count,")
    wrong = fault(tokens, length)
    return [float(x) for x in tokens] if wrong is None else RewardError(wrong)


def _row(batch: dict[str, Any], index: int, size: int) -> dict[str, Any]:
    return {
        name: [column[index]] if isinstance(column, list) and len(column) == size else column
        for name, column in batch.items()
    }


def _describe(batch: dict[str, Any], index: int) -> str:
    return f"prompt {_excerpt(batch['prompts'][index])}, completion {_excerpt(batch['completions'][index])}"


def _excerpt(value: Any, limit: int = 160) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def load_function(path: str) -> Callable[..., Any]:
    """The function, plain or async, at ``package.module:function`` or ``path/to/file.py:function``."""
    where, _, name = path.rpartition(":")
    if where.endswith(".py"):
        file = Path(where).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"reward {path!r}: no file {file.resolve()}")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"reward {path!r}: {error}. For a file that is not installed, write path/to/file.py:{name}"
            ) from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ValueError(f"reward {path!r}: {where} has no function {name!r}{_nearest(name, names)}")
    return function


def load_rewards(
    names: list[str],
    own: RewardFunction,
    timeout: float,
    fallback: float | None,
    of_model: RewardFunction | None = None,
) -> list[RewardFunction]:
    """The reward functions that `names` stand for.

    A name is "auto" (`own`, the task's reward), "exact", "math_verify", "reward_model" (`of_model`) or an import
    path (see `load_function`;
    guarded by GuardedReward with `timeout` and `fallback`). Raises ValueError for any other.
    """
    rewards: list[RewardFunction] = []
    for name in names:
        if name == "auto":
            rewards.append(own)
        elif name == "exact":
            rewards.append(exact_reward)
        elif name == "math_verify":
            rewards.append(math_verify_reward(timeout))
        elif name == "reward_model" and of_model is not None:
            rewards.append(of_model)
        elif ":" in name:
            rewards.append(GuardedReward(load_function(name), name.rpartition(":")[2], timeout, fallback))
        else:
            raise ValueError(
                f"unknown reward {name!r}{_nearest(name, BUILT_IN)}; choose from {', '.join(BUILT_IN)}, or give "
                "package.module:function or path/to/file.py:function"
            )
    return rewards


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, names, n=3)
    return f" (did you mean {', '.join(close)}?)" if close else ""
