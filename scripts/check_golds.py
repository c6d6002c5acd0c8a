"""Loads every problem set of a folder as a user would, and checks that math-verify accepts its own gold answers.

    python scripts/check_golds.py FOLDER      # of .jsonl files with question and answer columns

For each file: rows kept, rows whose gold answer cannot be used (`on_bad_gold: drop`), golds that score 1 when they
are given as the answer, and wrong answers (the gold plus one) that score 0.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from hapo.tasks import TaskConfig, load_task


def main() -> int:
    """One line a file; exit code 1 if a usable gold does not verify, or a wrong answer does."""
    logging.disable(logging.WARNING)
    failed = False
    for file in sorted(Path(sys.argv[1]).glob("*.jsonl")):
        with file.open() as lines:
            rows = sum(1 for line in lines if line.strip())
        task = load_task(TaskConfig(dataset=str(file), eval_size=1, on_bad_gold="drop"), seed=0)
        (reward,) = task.reward_funcs
        problems = task.train
        golds = problems["answer"]
        right = sum(reward(problems["prompt"], [f"The answer is \\boxed{{{g}}}." for g in golds], answer=golds))
        wrong = sum(
            reward(problems["prompt"], [f"The answer is \\boxed{{{g} + 1}}." for g in golds], answer=golds)
        )
        n = len(problems)
        print(
            f"{file.stem:<16} rows {rows:>5}  kept {n + 1:>5}  golds right {right:.0f}/{n}  wrong {wrong:.0f}/{n}"
        )
        failed |= right < n or wrong > 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
