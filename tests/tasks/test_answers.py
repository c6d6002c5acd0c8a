import pytest

from hapo.tasks import exact_reward, extract_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is <answer> 7 </answer>, no, <answer>8</answer>", "8"),
        (r"so \boxed{3}, rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("48/2 = <<48/2=24>>24\n#### 72", "72"),
        ("Answer: a grid\n1 2\n3 4\n", "a grid\n1 2\n3 4"),
        ("  Plain text ", "Plain text"),
        (r"cut off \boxed{\frac{1}{2", r"cut off \boxed{\frac{1}{2"),
        (r"<answer>\boxed{5}</answer> #### 6", r"\boxed{5}"),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_exact_reward_ignores_case_and_white_space_and_nothing_else():
    completions = [
        "The answer:  New   york",
        "#### NEW YORK",
        "New York.",
        [{"role": "assistant", "content": "new york"}],
    ]
    gold = ["New York"] * 4
    assert exact_reward(prompts=[""] * 4, completions=completions, answer=gold) == [1.0, 1.0, 0.0, 1.0]
