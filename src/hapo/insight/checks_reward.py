"""What a run did to reward, accuracy and length. Thresholds: docs/doctor_findings.md."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from .finding import Finding, percent
from .run import Run
from .trends import TREND, ends, longest, noise, smaller_rate, values


def constant_reward(run: Run) -> Finding | None:
    """Every answer of the run earned the same."""
    reward, spread = values(run, "reward"), values(run, "reward_std")
    if not len(reward) or np.ptp(reward) > 1e-6 or (spread > 1e-6).any():
        return None
    value = float(reward[0])
    change = "read some answers in report.html. "
    if value <= 0:
        change += (
            "Where right ones score 0, mend rewards, answer_column or prompt_template; where none is right, take "
            "easier problems, a stronger model, or a larger max_completion_length"
        )
    else:
        change += "Where wrong ones score, mend rewards; where all are right, take harder problems"
    return Finding(
        "constant_reward",
        "error",
        f"the reward of every answer was {value:g}, from the first to the last logged step",
        "advantages compare the answers of a group; equal rewards give advantage 0, and nothing is learned",
        change,
    )


def zero_variance_groups(run: Run) -> Finding | None:
    """Hardly any group holds answers of different rewards."""
    kept, equal = values(run, "dynamic_sampling/kept"), values(run, "frac_reward_zero_std")
    mixed = kept if len(kept) else 1 - equal
    if len(mixed) < 2 or (last := ends(mixed)[1]) >= 0.2:
        return None
    reward = ends(values(run, "reward"))[1]
    size = run.config.get("num_generations", 8)
    what = "harder" if reward > 0.5 else "easier"
    return Finding(
        "zero_variance_groups",
        "warning",
        f"at the end {percent(1 - last)} of the groups had equal rewards, their mean being {reward:.2f}",
        "such groups have advantage 0: the batch shrinks to the few others, and its gradient is noise",
        f"{what} problems; --num_generations {2 * size}; or --max_num_gen_batches 10, which draws other problems "
        "in their place, with a method that filters groups (hapo, dapo)",
    )


def truncated(run: Run) -> Finding | None:
    """Most answers end at the limit."""
    share, limit = values(run, "completions/clipped_ratio"), longest(run)
    if not len(share) or (last := ends(share)[1]) < 0.5:
        return None
    return Finding(
        "truncated",
        "error" if last >= 0.9 else "warning",
        f"at the end {percent(last)} of the answers were cut off at {limit} tokens",
        "what is cut off before its result scores 0 however good it is: the reward measures length",
        f"--max_completion_length {2 * limit}; if answers do not stop by themselves at any length, use the chat "
        "template of the model (--chat)",
    )


def truncation_rising(run: Run) -> Finding | None:
    """More and more answers end at the limit."""
    share, limit = values(run, "completions/clipped_ratio"), longest(run)
    if len(share) < TREND:
        return None
    first, last = ends(share)
    if last - first < 0.2:
        return None
    return Finding(
        "truncation_rising",
        "warning",
        f"answers cut off at {limit} tokens rose from {percent(first)} to {percent(last)}",
        "answers grow until the limit decides the reward",
        f"--max_completion_length {2 * limit}, or --overlong_buffer {max(limit // 5, 1)}, which lowers the reward "
        "before the limit is reached",
    )


def wrong_answers_grow(run: Run) -> Finding | None:
    """Wrong answers get long."""
    right, wrong = (values(run, f"completions/mean_length_{kind}") for kind in ("right", "wrong"))
    if len(wrong) < TREND or len(right) < TREND:
        return None
    (first, last), short = ends(wrong), ends(right)[1]
    if last < 1.5 * first or last < 2 * short:
        return None
    return Finding(
        "wrong_answers_grow",
        "warning",
        f"wrong answers grew from {first:.0f} to {last:.0f} tokens; right ones have {short:.0f}",
        "where a loss is divided by the length of its answer, long wrong answers are punished less per token, so "
        "the policy learns to fail at length",
        "a method that divides by all tokens of the batch (hapo, dapo) or by a constant (dr_grpo); "
        f"--overlong_buffer {max(longest(run) // 5, 1)}",
    )


def collapse(run: Run) -> Finding | None:
    """Held-out accuracy or reward ended far below its best."""
    found = [fall for fall in (_accuracy_fall(run.evaluations), _reward_fall(values(run, "reward"))) if fall]
    if not found:
        return None
    return Finding(
        "collapse",
        "error",
        "; ".join(found),
        "training took the model apart again: the last weights are not the best ones",
        f"take the checkpoint next to the best measurement, or train again with {smaller_rate(run)} and fewer "
        "optimiser steps a rollout batch (steps_per_generation)",
    )


def _accuracy_fall(evaluations: pd.DataFrame) -> str | None:
    for how, rows in evaluations.groupby("how"):
        best, last = rows.loc[rows["mean"].idxmax()], rows.iloc[-1]
        if last["high"] < best["low"]:
            return (
                f"held-out score ({how}) fell from {best['mean']:.3f} [{best['low']:.3f}, {best['high']:.3f}] at "
                f"step {best['step']} to {last['mean']:.3f} [{last['low']:.3f}, {last['high']:.3f}]"
            )
    return None


def _reward_fall(reward: np.ndarray) -> str | None:
    """From the best eighth of the run to its last one, by five standard errors and a fifth of the best."""
    width = len(reward) // TREND
    if width < 2:
        return None
    means = np.convolve(reward, np.ones(width) / width, "valid")
    best, last = float(means.max()), float(means[-1])
    if best - last <= max(5 * noise(reward) * math.sqrt(2 / width), 0.2 * abs(best)):
        return None
    return f"the reward fell from {best:.3g}, mean of its best {width} logged steps, to {last:.3g} in the last"


def no_improvement(run: Run) -> Finding | None:
    """Held-out accuracy did not change beyond its interval."""
    changes = {}
    for how, rows in run.evaluations.groupby("how"):
        before, after = (np.asarray(rows["scores"].iloc[i], dtype=float) for i in (0, -1))
        if len(rows) < 2 or before.shape != after.shape or before.size < 2:
            continue
        change = after - before
        half = 1.96 * float(change.std(ddof=1)) / math.sqrt(len(change))
        changes[how] = float(change.mean()) - half, float(change.mean()) + half
    if not changes or max(low for low, _ in changes.values()) > 0:
        return None
    return Finding(
        "no_improvement",
        "note",
        "held-out score, last minus first, 95 % interval over paired problems: "
        + ", ".join(f"{how} [{low:+.3f}, {high:+.3f}]" for how, (low, high) in changes.items()),
        "the intervals hold 0: training gained nothing that this many problems can show",
        "train longer (--max_steps), measure on more problems (--eval_size) or with more answers to each "
        "(--evaluate_samples 8)",
    )
