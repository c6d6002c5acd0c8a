import json
from decimal import Decimal

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from hapo.tasks import TaskConfig, load_task
from hapo.tasks.files import read_file

ROWS = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(4)]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        path.write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    assert read_file(write(tmp_path / f"data.{suffix}", ROWS)) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question": "q", "answer": 1}\n{"question": \n', r"a\.jsonl, line 2: malformed JSON"),
        ("a.jsonl", "[1, 2]\n", r"a\.jsonl, line 1: expected an object, found b'\[1, 2\]"),
        ("a.jsonl", b'{"question": "\xff"}\n', r"a\.jsonl, line 1: malformed JSON"),
        ("a.json", '{"question": "q"}\n{"question": "q"}\n', r"malformed JSON .*use \.jsonl for one object a line"),
        ("a.json", '{"question": "q"}', "expected a list of objects"),
        ("a.csv", 'question,answer\n"q,1\n', r"a\.csv, line 2: malformed CSV"),
        ("a.csv", "question,answer\nq,1,2\n", "line 2: malformed CSV .*more fields than the 2 of the header"),
        ("a.parquet", "not parquet at all", r"a\.parquet: malformed Parquet"),
        ("a.txt", "q 1", r"cannot read .*a\.txt'; give a file whose name ends in \.jsonl, \.json, \.parquet, \.csv"),
    ],
)  # fmt: skip
def test_malformed_files_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_task(TaskConfig(dataset=str(path)), seed=0)


def test_missing_file_is_named_with_the_place_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"'train\.jsonl' does not exist \(looked at {tmp_path}/train"):
        load_task(TaskConfig(dataset="train.jsonl"), seed=0)


def test_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        load_task(TaskConfig(dataset=str(tmp_path)), seed=0)


def test_anything_else_is_a_hub_id_with_configuration_and_splits(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(ROWS[:3] if split == "train" else ROWS[2:])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = TaskConfig(dataset="org/name-v1.5", dataset_config="main", test_split="test", rewards=["exact"])
    task = load_task(config, seed=0)
    assert asked == [("org/name-v1.5", "main", "train"), ("org/name-v1.5", "main", "test")]
    assert task.train["answer"] == ["1", "2"]
    assert task.eval["answer"] == ["3", "4"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("reward", ["exact", "math_verify"])
def test_numbers_stay_numbers(tmp_path, suffix, reward):
    numbers = [0.00003, 5.0, 1e22, 12, -2.5, 0.1]
    file = write(tmp_path / f"data.{suffix}", [{"question": f"{i}?", "answer": n} for i, n in enumerate(numbers)])
    evaluation = write(tmp_path / f"other.{suffix}", [{"question": "q", "answer": 1.0}])
    task = load_task(TaskConfig(dataset=file, eval_file=evaluation, rewards=[reward]), seed=0)
    written = ["0.00003", "5", "10000000000000000000000", "12", "-2.5", "0.1"]
    if suffix != "csv":  # whose numbers are text
        assert task.train["answer"] == written
    (score,) = task.reward_funcs
    assert score([""] * 6, [rf"\boxed{{{n}}}" for n in written], answer=task.train["answer"]) == [1.0] * 6


def test_decimals_of_parquet_are_numbers(tmp_path):
    rows = [{"question": f"{i}?", "answer": Decimal(n)} for i, n in enumerate(["5.00", "0.30", "1200.50"])]
    task = load_task(TaskConfig(dataset=write(tmp_path / "a.parquet", rows), eval_size=1), seed=0)
    assert sorted([*task.train["answer"], *task.eval["answer"]]) == ["0.3", "1200.5", "5"]
