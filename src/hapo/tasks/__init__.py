"""Data sets and verifiable rewards.

>>> config = TaskConfig(dataset="reasoning_gym:chain_sum", train_size=1000, eval_size=200)
>>> task = load_task(config, seed=0)
>>> task.reward_funcs[0](prompts=[...], completions=[...], **columns)   # TRL's signature
"""

from .config import TaskConfig
from .data import Task, load_task
from .rewards import GuardedReward, RewardError, exact_reward, load_rewards, math_verify_reward
from .stated import extract_answer
from .verifier import VerifiedReward

__all__ = [
    "GuardedReward",
    "RewardError",
    "Task",
    "TaskConfig",
    "VerifiedReward",
    "exact_reward",
    "extract_answer",
    "load_rewards",
    "load_task",
    "math_verify_reward",
]
