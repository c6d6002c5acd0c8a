import gc
import logging
import subprocess
import sys
import textwrap

import pytest

from hapo.tasks import math_verify_reward
from hapo.tasks.verifier import Judge


@pytest.fixture(scope="module")
def reward():
    reward = math_verify_reward(timeout=60.0)
    yield reward
    reward.judge.close()


@pytest.mark.parametrize(
    ("completion", "gold", "score"),
    [
        ("The answer is 72.", "72", 1.0),
        ("It is 71", "72", 0.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"so $\dfrac{14}{3}$", r"$\frac{14}{3}$", 1.0),
        (r"\boxed{(1, 2)}", "(2, 1)", 0.0),
        ("12 + 60 = 72, #### 72", "He has 12 + 60.\n#### 72", 1.0),
        (r"\boxed{1000}", "1,000", 1.0),
        (r"\boxed{18.90}", r"\$18.90", 1.0),
        ("no number here", "72", 0.0),
        ([{"role": "assistant", "content": r"\boxed{72}"}], "72", 1.0),
        ([{"role": "assistant", "content": None}], "72", 0.0),
    ],
)
def test_answers_are_compared_as_mathematics(reward, completion, gold, score):
    assert reward(prompts=["?"], completions=[completion], answer=[gold]) == [score]


def test_hostile_answers_are_ended_scored_wrong_and_counted(caplog):
    """The last of the four is refused at once; the others would never end."""
    reward = math_verify_reward(timeout=2.0)
    hostile = [r"\boxed{10^{10^{10}}}", "$9^{9^{9^{9}}}$", r"\boxed{10000000!}", r"\boxed{" + "(" * 3000]
    completions = [r"\boxed{1}", *hostile, "\ud800 1", r"\boxed{1}"]
    metrics = {}
    with caplog.at_level(logging.WARNING):
        scores = reward(["?"] * 7, completions, answer=["1"] * 7, log_metric=metrics.__setitem__)
    assert scores == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert "answers could not be checked and score 0 (the first: no verdict within 2 s" in caplog.text
    assert metrics["math_verify/unchecked"] >= 3 / 7
    reward.judge.close()


def test_process_is_reused_replaced_when_it_dies_and_gone_with_its_owner():
    judge = Judge("math_verify", 60.0)
    assert judge.ask("1", "1")
    process = judge._process
    assert judge.ask("2", "2")
    assert judge._process is process
    process.kill()
    process.wait()
    assert judge.ask("3", "3")
    replaced = judge._process
    del judge
    gc.collect()
    assert replaced.poll() is not None


def test_a_verifier_that_cannot_start_says_why():
    with pytest.raises(RuntimeError, match=r"the verifier 'reasoning_gym' cannot start: TypeError: .*'name'"):
        Judge("reasoning_gym", 60.0).ask("[0, 1, 0]", "1")


def test_training_scripts_need_no_main_guard(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        from hapo.tasks import math_verify_reward
        print("scored", math_verify_reward(60.0)(["?"], ["1"], answer=["1"]))
    """)
    )
    result = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert (result.stdout, result.stderr) == ("scored [1.0]\n", "")
