"""Questions as text and messages, rows of verl, and columns that reach rewards as they were written."""

import datetime
import json
import math
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest

from hapo.cli.arms import split_task
from hapo.tasks import TaskConfig, load_task
from hapo.tasks.benchmarks import load_benchmark
from hapo.tasks.table import dataset_of


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(rows, tmp_path, **options):
    config = {"dataset": jsonl(tmp_path / "a.jsonl", rows), "rewards": ["exact"], "eval_size": 1, **options}
    return load_task(TaskConfig(**config), seed=0)


def all_rows(task):
    rows = [part[i] for part in (task.train, task.eval) for i in range(len(part))]
    return sorted(rows, key=lambda row: row["question"])


AS_WRITTEN = {
    "objects": [{"a": 1}, {"b": {"c": None}}, {}],
    "lists of objects": [[{"a": 1}, {"b": 2}], [], [{"a": 1, "b": 2}]],
    "deep": [{"x": [{"y": {"z": 1}}]}, {"x": [{"y": {}}]}, {"x": []}],
    "order of keys": [{"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 3, "b": 4}],
    "kinds inside": [{"v": 1}, {"v": "one"}, {"v": [1, "two", None]}],
    "whole and fractional": [1, 2.5, 10**30],
    "numbers": [0.1, math.nan, -math.inf],
    "missing": [None, {"a": 1}, None],
    "text like JSON": ["5", '{"a": 1}', "null"],
    "truth": [True, None, False],
    "dates": [datetime.date(2024, 2, 29), None, datetime.date(1999, 1, 1)],
    "times": [datetime.datetime(2024, 1, 1, 12, 30), None, datetime.datetime(1999, 1, 1)],
    "bytes": [b"\xff", b"", None],
}


@pytest.mark.parametrize("name", AS_WRITTEN)
def test_a_data_set_gives_values_back_as_they_were_written(name):
    values = AS_WRITTEN[name]
    data = dataset_of([{"prompt": str(i), "column": value} for i, value in enumerate(values)])
    expected = list(map(repr, values))  # of which 1 and 1.0, or two orders of keys, are not equal
    assert [repr(data[i]["column"]) for i in range(3)] == expected
    assert [repr(row["column"]) for row in data] == expected
    assert list(map(repr, data["column"])) == list(map(repr, data[:]["column"])) == expected
    assert [repr(row["column"]) for row in data.select([2, 0])] == [expected[2], expected[0]]
    assert [repr(row["column"]) for row in data.filter(lambda row: row["prompt"] != "1")] == expected[::2]


def test_times_with_a_zone_and_decimals_are_those_that_were_written():
    noon = datetime.datetime(2024, 1, 1, 12, tzinfo=datetime.UTC)
    rows = [{"when": noon, "price": Decimal("5.00")}, {"when": None, "price": Decimal("0.3")}]
    data = dataset_of(rows)
    assert [data[i] for i in range(2)] == rows


def test_a_row_without_a_column_has_none_there():
    data = dataset_of([{"prompt": "a"}, {"prompt": "b", "unit": {"m": 1}}])
    assert [data[i] for i in range(2)] == [{"prompt": "a", "unit": None}, {"prompt": "b", "unit": {"m": 1}}]


def test_what_can_be_kept_by_nothing_is_refused():
    rows = [{"when": {"day": datetime.date(2024, 1, 1)}}, {"when": {"year": 2024}}]
    with pytest.raises(ValueError, match=r"column 'when', row 1: .*datetime\.date.* cannot be kept .* as text"):
        dataset_of(rows)


def test_extra_columns_reach_a_reward_as_they_were_written_through_splits_too(tmp_path):
    extras = [{"unit": "m"}, {"tests": [{"in": 1}, {"out": 2}]}, {"unit": None, "n": 1.0}, {}, {"n": 1}]
    rows = [{"question": f"{i}?", "answer": i, "meta": meta} for i, meta in enumerate(extras)]
    task = load(rows, tmp_path, extra_columns=["meta"])
    assert [row["meta"] for row in all_rows(task)] == extras
    config = TaskConfig(dataset=str(tmp_path / "a.jsonl"), eval_size=1, extra_columns="meta", rewards=["exact"])
    rest, tuning = split_task(config, 0, 2)
    parts = [part[i] for part in (rest.train, rest.eval, tuning) for i in range(len(part))]
    assert sorted(repr(row["meta"]) for row in parts) == sorted(map(repr, extras))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (1, "one", r"holds text \('one'\), but a number \(1\) in .*a\.jsonl, row 1\. Write the whole column"),
        ("one", 1, r"holds a number \(1\), but text \('one'\)"),
        (True, 1, r"holds a number \(1\), but true or false \(True\)"),
        ([1], {"a": 1}, r"holds an object \(\{'a': 1\}\), but a list"),
        ("text", math.nan, r"holds a number \(nan\), but text"),
    ],
)
def test_a_column_of_two_kinds_is_refused_by_name_and_row(tmp_path, first, second, message):
    values = [first, None, second, first]
    rows = [{"question": f"{i}?", "answer": i, "unit": value} for i, value in enumerate(values)]
    with pytest.raises(ValueError, match=rf"a\.jsonl, row 3: column 'unit' {message}"):
        load(rows, tmp_path, extra_columns=["unit"])


def test_kinds_are_compared_over_the_files_of_a_folder(tmp_path):
    for name, unit in (("a", "m"), ("b", 1)):
        jsonl(tmp_path / f"{name}.jsonl", [{"question": name, "answer": 1, "unit": unit}])
    with pytest.raises(ValueError, match=r"b\.jsonl, row 1: column 'unit' .* \('m'\) in .*a\.jsonl, row 1\."):
        load_task(TaskConfig(dataset=str(tmp_path), extra_columns=["unit"], eval_size=1), seed=0)


SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "1+1?"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
RESULT = {"role": "tool", "name": "add", "content": "2"}


def test_prompts_are_messages_as_they_were_written(tmp_path):
    rows = [
        {"prompt": [USER], "answer": 2},
        {"prompt": [SYSTEM, {**USER, "content": "2+2?"}], "answer": 4},
        {"prompt": [USER, CALL, RESULT], "answer": 2},
    ]
    first, conversation, other = all_rows(load(rows, tmp_path))
    assert first == {"prompt": [USER], "question": "1+1?", "answer": "2"}
    assert (conversation["prompt"], conversation["question"]) == ([USER, CALL, RESULT], "1+1?\n\n2")
    assert (other["prompt"], other["question"]) == (rows[1]["prompt"], "2+2?")


def test_template_and_system_prompt_go_around_messages(tmp_path):
    rows = [{"problem": [{**USER, "content": f"{i}?", "name": "u"}], "answer": i} for i in range(2)]
    options = {"question_column": "problem", "chat": True, "prompt_template": "Solve {question}"}
    first, _ = all_rows(load(rows, tmp_path, system_prompt="Be brief.", **options))
    assert first["prompt"] == [SYSTEM, {"role": "user", "content": "Solve 0?", "name": "u"}]
    assert first["question"] == "0?"
    rows[1]["problem"].insert(0, SYSTEM)
    with pytest.raises(ValueError, match=r"row 2: the messages have a system message .* leave system_prompt out"):
        load(rows, tmp_path, system_prompt="Be short.", **options)


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [USER, {"role": "assistant", "content": "2"}],
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}],
        [{"role": "user", "content": " "}],
        [{"content": "1+1?"}],
        ["1+1?"],
        {"role": "user", "content": "1+1?"},
        7,
    ],
)
def test_what_is_no_prompt_is_refused(tmp_path, prompt):
    with pytest.raises(ValueError, match=r"row 2: the question must be text, or a list of messages"):
        load([{"prompt": [USER], "answer": 2}, {"prompt": prompt, "answer": 2}], tmp_path)


def test_text_and_messages_in_one_column_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"row 2: column 'prompt' holds text \('2\?'\), but a list"):
        load([{"prompt": [USER], "answer": 2}, {"prompt": "2?", "answer": 2}], tmp_path)


def verl_row(index, gold, **extra):
    """As verl's examples/data_preprocess writes it."""
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"{index}+1?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": gold},
        "extra_info": {"split": "train", "index": index, **extra},
    }


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_verl_are_read_without_options(tmp_path, kind):
    rows = [verl_row(i, str(i + 1), answer=f"so {i + 1}") for i in range(4)]
    file = tmp_path / f"train.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        jsonl(file, rows)
    task = load_task(TaskConfig(dataset=str(file), eval_size=1), seed=0)
    for i, row in enumerate(all_rows(task)):
        assert row == {**rows[i], "question": f"{i}+1?", "answer": str(i + 1)}
    (reward,) = task.reward_funcs
    row = task.eval[0]
    completions = [[{"role": "assistant", "content": rf"\boxed{{{n}}}"}] for n in (row["answer"], 77)]
    columns = {name: [value] * 2 for name, value in row.items() if name != "prompt"}
    assert reward(prompts=[row["prompt"]] * 2, completions=completions, **columns) == [1.0, 0.0]


def test_a_benchmark_may_be_a_folder_of_verl_rows(tmp_path):
    for split, size in (("train", 3), ("test", 2)):
        jsonl(tmp_path / f"{split}.jsonl", [verl_row(i, i + 1) for i in range(size)])
    one = load_benchmark(str(tmp_path), TaskConfig(), folder=None, size=None)
    assert (one.name, one.of, one.unreadable) == (tmp_path.name, 2, 0)
    assert one.problems["answer"][:] == ["1", "2"]
    assert one.problems[0]["prompt"] == [{"role": "user", "content": "0+1?"}]


def test_golds_that_are_objects_are_for_rewards_of_ones_own(tmp_path):
    golds = [{"target": ["Paris"]}, {"target": ["Rome", "Roma"], "any": True}]
    rows = [verl_row(i, gold) for i, gold in enumerate(golds)]
    with pytest.raises(ValueError, match="cannot be used; the first is row 1: .*Paris.*it is no text"):
        load(rows, tmp_path)
    (tmp_path / "mine.py").write_text(
        "def known(prompts, completions, answer, **columns):\n"
        "    return [float(c in a['target']) for c, a in zip(completions, answer)]\n"
    )
    task = load(rows, tmp_path, rewards=[f"{tmp_path / 'mine.py'}:known"])
    assert [row["answer"] for row in all_rows(task)] == golds
    assert task.majority_share == 1.0
    assert task.reward_funcs[0](prompts=["?"] * 2, completions=["Roma", "Oslo"], answer=golds[1:] * 2) == [
        1.0,
        0.0,
    ]


def test_names_look_into_objects_unless_a_column_has_the_name(tmp_path):
    rows = [{"q": {"text": f"{i}?"}, "a.b": i, "a": {"b": 7}} for i in range(2)]
    first, _ = all_rows(load(rows, tmp_path, question_column="q.text", answer_column="a.b", extra_columns="a.b"))
    assert first == {"prompt": "0?", "question": "0?", "answer": "0", "a.b": 0}
    with pytest.raises(ValueError, match=r"no column 'q\.txt'; it has 'q', 'a\.b', 'a'\. .*a\.b stands for key b"):
        load(rows, tmp_path, question_column="q.txt", answer_column="a.b")
