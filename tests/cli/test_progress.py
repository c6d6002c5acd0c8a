"""What a user sees of a run."""

from __future__ import annotations

import io

from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from hapo.cli.progress import TrainingProgress, describe

LOGS = {
    "loss": 0.0,
    "reward": 0.3125,
    "entropy": 0.12345,
    "completions/mean_length": 21.5,
    "clip_ratio/low_mean": 0.0012,
    "clip_ratio/high_mean": 0.03,
}


def test_the_line_has_reward_accuracy_entropy_length_clip_shares_and_speed():
    assert describe(LOGS, 5123.4, binary=True) == (
        "reward 0.312  accuracy 31.2 %  entropy 0.123  length 21.5  clipped low 0.12 % high 3.00 %  5,123 tokens/s"
    )
    assert "accuracy" not in describe(LOGS, 0.0, binary=False)


def shown(terminal: bool, tmp_path) -> str:
    out = io.StringIO()
    args = TrainingArguments(str(tmp_path), disable_tqdm=False, report_to="none", use_cpu=True)
    progress = TrainingProgress(Console(file=out, force_terminal=terminal, width=120), lambda: True)
    state = TrainerState(max_steps=4, global_step=1, num_input_tokens_seen=10)
    progress.on_train_begin(args, state, TrainerControl())
    for step in (2, 3, 4):
        state.global_step, state.num_input_tokens_seen = step, 10 * step
        progress.on_step_end(args, state, TrainerControl())
        progress.on_log(args, state, TrainerControl(), logs=LOGS if step != 3 else {"loss": 1.0})
    progress.close()
    return out.getvalue()


def test_without_a_terminal_there_are_plain_lines_and_the_last_step_is_one_of_them(tmp_path):
    lines = shown(False, tmp_path).splitlines()
    assert [line.split("  ")[:2] for line in lines] == [["step 2/4", "reward 0.312"], ["step 4/4", "reward 0.312"]]


def test_on_a_terminal_there_is_a_bar_with_the_line_below(tmp_path):
    text = shown(True, tmp_path)
    assert "4/4" in text
    assert "accuracy 31.2 %" in text
