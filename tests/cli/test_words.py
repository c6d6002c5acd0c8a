"""What `hapo compare` and `hapo report` say of a model that is always wrong, or always right."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hapo.cli import main
from hapo.insight import compare_page, report
from tests.insight.conftest import make_run
from tests.insight.test_compare import write_run

WRONG = (
    "no answer was ever right, in any arm: nothing was learned, and arms cannot differ. Read some answers (hapo eval "
    "--output). Look first for right ones that score 0: rewards, answer_column, prompt_template, chat;"
)
RIGHT = (
    "every answer was right, in every arm, from the start: nothing was left to learn, and arms cannot differ. Check "
    "that rewards can tell a wrong answer; where they can, take harder problems"
)


@pytest.fixture(autouse=True)
def without_figures(monkeypatch) -> None:
    """They take seconds and hold none of the words."""
    monkeypatch.setattr(compare_page, "figures", lambda comparison, tuning: [])
    for name in ("curves", "others", "token_figures"):
        monkeypatch.setattr(report, name, lambda runs: [])


@pytest.mark.parametrize(("accuracy", "words"), [(0.0, WRONG), (1.0, RIGHT)])
@pytest.mark.parametrize("target", [[], ["--target", "0.5"]])
def test_a_comparison_where_all_is_wrong_or_right_says_so_and_what_to_check(
    accuracy, words, target, tmp_path, capsys
):
    named = []
    for arm in ("hapo", "dapo"):
        run = write_run(tmp_path / arm, [accuracy] * 3, gradient=[1.0])
        told = json.loads((run / "manifest.json").read_text())
        (run / "manifest.json").write_text(json.dumps({**told, "seed": 1}))
        named.append(f"{arm}={run}")
    assert main(["compare", "--runs", *named, "--output_dir", str(tmp_path / "out"), *target]) == 0
    written = [(tmp_path / "out" / name).read_text() for name in ("compare.html", "comparison.md")]
    for text in (capsys.readouterr().out, *written):
        assert words in text
        assert "train longer" not in text and "at 0 tokens" not in text and "1 of 1" not in text


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (
            0.0,
            "Where right ones score 0, mend rewards, answer_column or prompt_template; where none is right, take",
        ),
        (1.0, "Where wrong ones score, mend rewards; where all are right, take harder problems"),
    ],
)
def test_the_report_of_a_run_where_all_is_wrong_or_right_says_so_and_what_to_check(reward, words, tmp_path):
    def constant(line: dict) -> dict:
        return {**line, "reward": reward, "reward_std": 0.0, "frac_reward_zero_std": 1.0}

    run = make_run(
        tmp_path / "run", "hapo", rewards=lambda _, groups, size: np.full((groups, size), reward), lines=constant
    )
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert f"the reward of every answer was {reward:g}, from the first to the last logged step" in page
    assert words in page
