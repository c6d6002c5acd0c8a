import gzip
import json
from decimal import Decimal

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from hapo.tasks import TaskConfig, load_task
from hapo.tasks.files import read_file, set_name

ROWS = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(4)]


KINDS = ["jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "json.gz", "csv.gz", "tsv.gz"]


def write(path, rows):
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    mark = {"csv": ",", "tsv": "\t"}.get(kind, "")
    lines = ["question,answer".replace(",", mark), *(f"{r['question']}{mark}{r['answer']}" for r in rows)]
    text = {
        "jsonl": "\n".join(map(json.dumps, rows)) + "\n\n",
        "json": json.dumps(rows),
        "csv": "\n\n".join(lines) + "\n",
        "tsv": "\n\n".join(lines) + "\n",
    }[kind].encode("utf-8-sig")
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


@pytest.mark.parametrize("suffix", [*KINDS, "JSONL"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    """Text with a byte-order mark and empty lines."""
    file = tmp_path / f"data.{suffix}"
    assert read_file(write(file.with_name(file.name.lower()), ROWS)) == ROWS
    file.with_name(file.name.lower()).rename(file)
    assert read_file(str(file)) == ROWS
    assert set_name(str(file)) == "data"


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
        ("a.csv", "question,answer\n\nq\n", "line 3: malformed CSV .*fewer fields than the 2 of the header"),
        ("a.tsv", "question\tanswer\tanswer\n", "line 1: malformed TSV .the header names 'answer' more than once"),
        ("a.tsv", b"question\tanswer\nq\xff\t1\n", "malformed TSV .*utf-8"),
        ("a.jsonl.gz", '{"question": "q", "answer": 1}', r"a\.jsonl\.gz: damaged gzip file"),
        ("a.csv.gz", gzip.compress(b"question,answer\n" * 99, mtime=0)[:-9], r"a\.csv\.gz: damaged gzip file"),
        ("a.parquet", "not parquet at all", r"a\.parquet: malformed Parquet"),
        ("a.txt", "q 1", r"cannot read .*a\.txt'; give a file whose name ends in \.jsonl, \.json, \.parquet, \.csv, \.tsv, \.jsonl\.gz"),
        ("a.parquet.gz", "", "cannot read"),
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


def folder(path, **rows):
    path.mkdir()
    for name, some in rows.items():
        write(path / name.replace("__", "."), some)
    (path / "README.md").write_text("what this is")
    return str(path)


def load(**options):
    return load_task(TaskConfig(rewards=["exact"], **options), seed=0)


def test_a_folder_is_its_data_files_in_the_order_of_their_names(tmp_path):
    data = folder(
        tmp_path / "data", b__jsonl=ROWS[1:2], a__csv=ROWS[:1], c__parquet=ROWS[2:3], d__tsv__gz=ROWS[3:]
    )
    evaluation = folder(tmp_path / "other", x__json=[{"question": "q", "answer": "a"}])
    task = load(dataset=data, eval_file=evaluation)
    assert task.train["question"] == [row["question"] for row in ROWS]
    assert task.eval["answer"] == ["a"]


def test_names_of_files_in_a_folder_say_their_split(tmp_path, caplog):
    parts = {"train-0__jsonl": ROWS[:2], "train-1__jsonl": ROWS[2:3], "mine_test__csv": ROWS[3:]}
    data = folder(tmp_path / "data", **parts)
    task = load(dataset=data, test_split="test")
    assert (task.train["answer"], task.eval["answer"]) == (["1", "2", "3"], ["4"])
    assert "left out" not in caplog.text
    assert load(dataset=data, train_split="0", test_split="1").train["answer"] == ["1", "2"]
    assert "read are train-0.jsonl; left out are mine_test.csv" in caplog.text
    caplog.clear()
    held_out = load(dataset=data, eval_size=1)
    assert sorted([*held_out.train["answer"], *held_out.eval["answer"]]) == ["1", "2", "3"]
    assert "read are train-0.jsonl, train-1.jsonl; left out are mine_test.csv" in caplog.text
    assert load(dataset=write(tmp_path / "one.jsonl", ROWS), eval_file=data).eval["answer"] == ["4"]


def test_folders_that_do_not_say_what_is_meant_are_refused(tmp_path):
    outer = folder(tmp_path / "outer")
    (tmp_path / "outer/inner").mkdir()
    with pytest.raises(ValueError, match="outer holds no data file .*; name a folder in it: inner"):
        load(dataset=outer)
    data = folder(tmp_path / "data", a__jsonl=ROWS)
    with pytest.raises(ValueError, match="no file of the split 'test': no name of its files says a split"):
        load(dataset=data, test_split="test")
    split = folder(tmp_path / "split", train__jsonl=ROWS, b__jsonl=ROWS)
    with pytest.raises(ValueError, match=r"no file of the split 'test': its splits are in train\.jsonl"):
        load(dataset=split, test_split="test")


def test_rows_of_a_folder_are_named_by_file(tmp_path):
    data = folder(tmp_path / "data", a__jsonl=ROWS, b__jsonl=[*ROWS[:2], {"question": 5, "answer": 1}])
    with pytest.raises(ValueError, match=r"data/b\.jsonl, row 3: the question must be text"):
        load(dataset=data)


def test_long_fields_are_read(tmp_path):
    long = "x" * 200_000
    assert read_file(write(tmp_path / "a.csv", [{"question": long, "answer": "1"}]))[0]["question"] == long


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


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv.gz", "parquet"])
@pytest.mark.parametrize("reward", ["exact", "math_verify"])
def test_numbers_stay_numbers(tmp_path, suffix, reward):
    numbers = [0.00003, 5.0, 1e22, 12, -2.5, 0.1]
    file = write(tmp_path / f"data.{suffix}", [{"question": f"{i}?", "answer": n} for i, n in enumerate(numbers)])
    evaluation = write(tmp_path / f"other.{suffix}", [{"question": "q", "answer": 1.0}])
    task = load_task(TaskConfig(dataset=file, eval_file=evaluation, rewards=[reward]), seed=0)
    written = ["0.00003", "5", "10000000000000000000000", "12", "-2.5", "0.1"]
    if "sv" not in suffix:  # whose numbers are text
        assert task.train["answer"] == written
    (score,) = task.reward_funcs
    assert score([""] * 6, [rf"\boxed{{{n}}}" for n in written], answer=task.train["answer"]) == [1.0] * 6


def test_decimals_of_parquet_are_numbers(tmp_path):
    rows = [{"question": f"{i}?", "answer": Decimal(n)} for i, n in enumerate(["5.00", "0.30", "1200.50"])]
    task = load_task(TaskConfig(dataset=write(tmp_path / "a.parquet", rows), eval_size=1), seed=0)
    assert sorted([*task.train["answer"], *task.eval["answer"]]) == ["0.3", "1200.5", "5"]
