"""Reward function of verl, `reward.custom_reward_function.path`: addition by its sum, all else by math-verify."""

import functools
import threading
from typing import Any

from hapo.tasks import math_verify_reward
from hapo.tasks.addition import addition_reward

SECONDS = 5.0
"""For one answer; what takes longer is not verified and scores 0."""

_ONE_AT_A_TIME = threading.Lock()  # verl calls from many threads of each of its reward.num_workers processes


@functools.cache
def math_verify() -> Any:
    """The verifier of this process, which judges in a process of its own that it may end at any moment."""
    return math_verify_reward(SECONDS)


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **others: Any
) -> dict[str, float]:
    """1 for a right answer, else 0: as `score`, which a reward manager may shape, and as `acc`, which stays."""
    if data_source == "addition":
        (right,) = addition_reward([""], [solution_str], [ground_truth])
    else:
        with _ONE_AT_A_TIME:
            (right,) = math_verify()([""], [solution_str], answer=[ground_truth])
    return {"score": right, "acc": right}
