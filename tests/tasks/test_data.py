import json
import logging

import pytest

from hapo.tasks import TaskConfig, load_task


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(numbers):
    return [{"question": f"What is {i} + 1?", "answer": i + 1} for i in numbers]


def test_one_file_is_split_by_content(tmp_path):
    again = [{"question": "  WHAT is 3  +  1? ", "answer": 4}] * 20
    data = jsonl(tmp_path / "a.jsonl", sums(range(12)) + again)
    tasks = [load_task(TaskConfig(dataset=data, eval_size=6, rewards=["exact"]), seed=seed) for seed in (0, 1)]
    for task in tasks:
        train, held_out = (
            {" ".join(q.lower().split()) for q in part["question"]} for part in (task.train, task.eval)
        )
        assert len(task.eval) == len(held_out) == 6
        assert not train & held_out
        assert len(train | held_out) == 12
    assert tasks[0].eval["question"] == tasks[1].eval["question"]


def test_training_rows_that_are_evaluation_questions_are_dropped_and_counted(tmp_path, caplog):
    train = jsonl(tmp_path / "train.jsonl", sums(range(10)))
    evaluation = jsonl(tmp_path / "eval.jsonl", [{"question": "what is 9 + 1?", "answer": 10}, *sums([8, 20])])
    config = TaskConfig(dataset=train, eval_file=evaluation, eval_size=2, train_size=5, rewards=["exact"])
    with caplog.at_level(logging.WARNING):
        task = load_task(config, seed=0)
    assert "dropped 2 of 10 training rows whose questions are evaluation questions" in caplog.text
    assert (len(task.train), len(task.eval)) == (5, 2)
    assert load_task(config, seed=0).fingerprint == task.fingerprint
    other = load_task(config, seed=1)
    assert other.fingerprint != task.fingerprint
    assert other.eval["question"] == task.eval["question"]


def test_prompts_are_text_or_messages(tmp_path):
    data = jsonl(tmp_path / "a.jsonl", [{"problem": f"{i}?", "gold": i, "unit": "m"} for i in range(3)])
    columns = {"dataset": data, "question_column": "problem", "answer_column": "gold", "eval_size": 1}
    template = r"{question} Put it in \boxed{}."
    task = load_task(TaskConfig(**columns, prompt_template=template, extra_columns=["unit"]), seed=0)
    row = task.train[0]
    assert row == {
        "prompt": row["question"] + r" Put it in \boxed{}.",
        "question": row["question"],
        "answer": row["answer"],
        "unit": "m",
    }
    task = load_task(TaskConfig(**columns, chat=True, system_prompt="Be brief."), seed=0)
    assert task.train[0]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": task.train[0]["question"]},
    ]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "no rows"),
        (
            [{"problem": "q", "answer": 1}],
            {},
            "no column 'question'; it has 'problem', 'answer'. Set question_column",
        ),
        (
            [{"question": " ", "answer": 1}],
            {},
            "row 1: the question must be text, or a list of messages .*, not ' '",
        ),
        (sums(range(3)), {"train_split": "test"}, "is a file and has no split 'test'"),
        (sums(range(3)), {"eval_size": 3}, "cannot hold out 3 of 3 distinct questions .* lower eval_size"),
        (sums(range(3)), {"eval_size": 1, "train_size": 9}, "train_size is 9, but there are 2 rows"),
    ],
)
def test_unusable_data_are_refused(tmp_path, rows, options, message):
    data = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load_task(TaskConfig(dataset=data, rewards=["exact"], **options), seed=0)


@pytest.mark.parametrize(
    ("gold", "fault"),
    [
        (None, "None .it is no text"),
        (float("nan"), "nan .it is no text"),
        ([1], r"\[1\] .it is no text"),
        ("", "'' .it is empty"),
        ("???", r"'\?\?\?' .*math-verify finds no expression"),
        (r"\frac{", "math-verify finds no expression"),
        ("yes", "'yes' .*math-verify reads a word as a product of letters"),
    ],
)
def test_gold_answers_that_no_reward_can_use_are_refused_or_dropped(tmp_path, caplog, gold, fault):
    rows = sums(range(4))
    rows[2]["answer"] = gold
    data = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=rf"1 of 4 gold answers cannot be used; the first is row 3: .*{fault}"):
        load_task(TaskConfig(dataset=data, eval_size=1), seed=0)
    with caplog.at_level(logging.WARNING):
        task = load_task(TaskConfig(dataset=data, eval_size=1, on_bad_gold="drop"), seed=0)
    assert "dropped 1 of 4 rows" in caplog.text
    assert sorted([*task.train["answer"], *task.eval["answer"]]) == ["1", "2", "4"]


def test_a_constant_answer_that_wins_is_announced(tmp_path, caplog):
    rows = [{"question": f"Is {i} prime?", "answer": "No" if i < 6 else "Yes"} for i in range(8)]
    data = jsonl(tmp_path / "a.jsonl", sums(range(9)))
    config = TaskConfig(dataset=data, eval_file=jsonl(tmp_path / "b.jsonl", rows), rewards=["exact"])
    with caplog.at_level(logging.WARNING):
        assert load_task(config, seed=0).majority_share == 0.75
    assert "one constant answer is right on 75 % of the evaluation problems" in caplog.text


def test_files_of_mathematics_load_and_their_gold_answers_verify(tmp_path):
    golds = [72, "10", "-3.5", "1/2", "$18", "70,000", r"\frac{3}{4}", r"25\%", r"\sqrt{2}", "x^2+1"]
    rows = [{"question": f"Problem {i}?", "answer": gold} for i, gold in enumerate(golds)]
    file = jsonl(tmp_path / "problems.jsonl", rows)
    others = jsonl(tmp_path / "others.jsonl", sums(range(20)))
    task = load_task(TaskConfig(dataset=others, eval_file=file), seed=0)
    assert (len(task.train), len(task.eval)) == (20, len(golds))
    (reward,) = task.reward_funcs
    prompts, answers = task.eval["prompt"], task.eval["answer"]
    right = [rf"so she has \boxed{{{gold}}}" for gold in answers]
    wrong = [rf"so she has \boxed{{{gold}}} or rather \boxed{{4{i}}}" for i, gold in enumerate(answers)]
    assert reward(prompts, right, answer=answers) == [1.0] * len(golds)
    assert reward(prompts, wrong, answer=answers)[1:] == [0.0] * (len(golds) - 1)


def test_embedded_task_is_the_default():
    task = load_task(TaskConfig(train_size=8, eval_size=4), seed=0)
    assert (task.name, len(task.train), len(task.eval)) == ("addition", 8, 4)
    row = task.eval[0]
    assert row["prompt"] == row["question"] + "="
    (reward,) = task.reward_funcs
    assert reward([row["prompt"]] * 2, [row["answer"], "0"], answer=[row["answer"]] * 2) == [1.0, 0.0]
