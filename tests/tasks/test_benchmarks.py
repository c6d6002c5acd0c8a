"""Named sets: a set is what its name says, or it is refused with what was found."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hapo.tasks import TaskConfig
from hapo.tasks import benchmarks as module
from hapo.tasks.benchmarks import BENCHMARKS, Benchmark, HubSource, content_hash, find_benchmark, load_benchmark

ROWS = [{"question": f"What is ${i} + 1$?", "answer": str(i + 1)} for i in range(4)]
OTHER = [{"question": f"What is ${i} - 1$?", "answer": str(i - 1)} for i in range(5)]
SMALL = {
    "small": Benchmark("Small", 4, content_hash(ROWS), HubSource("org/small", "main", "test", "problem", "gold")),
    "other": Benchmark("Other", 5, content_hash(OTHER), None),
    "counted": Benchmark("Counted", 3, None, None),
}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Three little sets in place of the real ones; writes rows as the file of one and loads it."""
    monkeypatch.setattr(module, "BENCHMARKS", SMALL)

    def load(name, rows, *, size=None, **options):
        write(tmp_path / f"{name}.jsonl", rows)
        return load_benchmark(name, TaskConfig(**options), folder=tmp_path, size=size)

    return load


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_sets_have_the_published_numbers_of_problems():
    assert {name: b.rows for name, b in BENCHMARKS.items()} == {
        "aime24": 30, "aime25": 30, "amc": 83, "amc23": 40, "math500": 500, "minerva_math": 272,
        "olympiadbench": 675, "gsm8k": 1319, "svamp": 1000, "mawps": 2065,
    }  # fmt: skip
    hashes = [b.sha256 for b in BENCHMARKS.values() if b.sha256 is not None]
    assert len(set(hashes)) == len(hashes) == 9
    assert all(len(h) == 64 for h in hashes)


def test_content_does_not_depend_on_order_spacing_or_the_way_a_number_is_written():
    rows = [{"question": "a  b\n", "answer": "70000"}, {"question": "c", "answer": r"\frac{1}{2}"}]
    same = [{"question": "c", "answer": r"\frac{1} {2}"}, {"question": "a b", "answer": "so 7 x 10\n#### 70,000"}]
    assert content_hash(rows) == content_hash(same)
    for answer in (70000.0, 70000, "070000", r"\boxed{70000.00}"):
        assert content_hash([rows[0] | {"answer": answer}, rows[1]]) == content_hash(rows)
    for change in ({"answer": "70001"}, {"answer": "-70000"}, {"answer": "7,0000"}, {"question": "a B"}):
        assert content_hash([rows[0] | change, rows[1]]) != content_hash(rows)
    assert content_hash([rows[0], *rows]) != content_hash(rows)


def test_hash_of_a_row_is_the_sha256_of_its_json():
    # printf '%s' '["1+1?", "2"]' | sha256sum
    expected = "82831a5898978c02b7431cfa799f247af2b308c6b5d43a89f821c0bb5ac758bd"
    assert content_hash([{"question": "1 + 1 ?", "answer": " 2.0"}]) == expected


def test_a_set_is_loaded_whole_or_as_the_same_sample(small):
    found = small("small", ROWS[::-1], prompt_template="{question} Think.")
    assert (found.of, found.verified, found.unreadable, found.source) == (4, True, 0, "small.jsonl")
    assert found.problems[0] == {
        "prompt": "What is $3 + 1$? Think.",
        "question": "What is $3 + 1$?",
        "answer": "4",
    }
    parts = [small("small", ROWS, size=2) for _ in range(2)]
    assert [len(p.problems) for p in parts] == [2, 2]
    assert parts[0].problems["question"] == parts[1].problems["question"]
    assert (parts[0].of, parts[0].sha256) == (4, found.sha256)


def test_messages_go_with_a_system_prompt(small):
    found = small("small", ROWS, chat=True, system_prompt="Be brief.")
    assert [m["content"] for m in found.problems[0]["prompt"]] == ["Be brief.", "What is $0 + 1$?"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ROWS[:3],
            r"small \(Small\) has 4 problems, but these are 3, as many as counted \(Counted\) has. A set of",
        ),
        (ROWS[:2], r"small \(Small\) has 4 problems, but these are 2. A set of your own goes by the name of its"),
        (
            OTHER,
            r"this is other \(Other, 5 problems\), not small \(Small, 4 problems\). Ask for --benchmarks other",
        ),
        (
            [*ROWS[:3], ROWS[3] | {"answer": "5"}],
            "has other questions or answers than these 4: their hash is [0-9a-f]",
        ),
        ([*ROWS[:3], ROWS[3] | {"answer": None}], "row 4: the answer must be text or a number, not None"),
        ([{"question": "q"}] * 4, "no column 'answer'; it has 'question'"),
    ],
)
def test_other_content_is_refused_and_named(small, rows, message):
    with pytest.raises(ValueError, match=message):
        small("small", rows)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "amc23",
            83,
            r"amc23 \(AMC 12 of 2023\) has 40 problems, but these are 83, as many as amc \(AMC 12 of 2022",
        ),
        (
            "amc",
            40,
            r"amc \(AMC 12 of 2022 and 2023\) has 83 problems, but these are 40, as many as amc23 \(AMC 12",
        ),
        ("aime24", 30, "has other questions or answers"),
    ],
)
def test_the_two_amc_sets_are_never_taken_for_each_other(tmp_path, name, rows, message):
    write(tmp_path / f"{name}.jsonl", [{"question": f"{i}?", "answer": i} for i in range(rows)])
    with pytest.raises(ValueError, match=message):
        load_benchmark(name, TaskConfig(), folder=tmp_path, size=None)


def test_a_known_amc_set_under_the_other_name_is_recognised(monkeypatch, tmp_path):
    rows = [{"question": f"{i}?", "answer": i} for i in range(40)]
    monkeypatch.setitem(BENCHMARKS, "amc23", replace(BENCHMARKS["amc23"], sha256=content_hash(rows)))
    write(tmp_path / "amc.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"this is amc23 \(AMC 12 of 2023, 40 problems\), not amc \(.*83 problems\)"
    ):
        load_benchmark("amc", TaskConfig(), folder=tmp_path, size=None)


def test_a_set_without_a_known_hash_is_counted_and_says_so(small):
    found = small("counted", ROWS[:3])
    assert (found.of, found.verified) == (3, False)


def test_the_hub_is_read_by_the_columns_of_its_set(monkeypatch, small):
    asked = []

    def hub(*source):
        asked.append(source)
        return [{"problem": row["question"], "gold": f"work #### {row['answer']}.0", "id": 1} for row in ROWS]

    monkeypatch.setattr(module, "read_hub", hub)
    found = load_benchmark("small", TaskConfig(extra_columns=["unit"]), folder=None, size=None)
    assert asked == [("org/small", "main", "test")]
    assert (found.sha256, found.source) == (SMALL["small"].sha256, "org/small, split test")
    assert found.reward(["p"], ["It is $1$."], answer=[found.problems[0]["answer"]]) == [1.0]
    with pytest.raises(ValueError, match=r"put other.jsonl into a folder and give --benchmark_folder"):
        load_benchmark("other", TaskConfig(), folder=None, size=None)


def test_golds_that_cannot_be_read_stay_and_are_counted(monkeypatch, small):
    rows = [*ROWS[:3], {"question": "Who?", "answer": "no one at all"}]
    monkeypatch.setitem(SMALL, "small", replace(SMALL["small"], sha256=content_hash(rows)))
    found = small("small", rows)
    assert (len(found.problems), found.unreadable) == (4, 1)


def test_a_file_of_ones_own_goes_by_its_name(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"problem": "1 + 1?", "answer": 2}])
    found = load_benchmark(path, TaskConfig(question_column="problem"), folder=None, size=None)
    assert (found.name, found.of, found.verified, found.source) == ("mine", 1, False, path)


def test_generated_tasks_bring_their_own_reward():
    found = load_benchmark("reasoning_gym:chain_sum", TaskConfig(), folder=None, size=3)
    assert (found.name, found.of, found.source) == ("reasoning_gym:chain_sum", 3, "generated")
    row = found.problems[0]
    assert found.reward(["p"], [row["answer"]], **{k: [v] for k, v in row.items()}) == [1.0]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "aime2024",
            ValueError,
            r"unknown benchmark 'aime2024' \(did you mean aime24\?\); choose from aime24, aime25",
        ),
        ("zzz", ValueError, r"unknown benchmark 'zzz'; choose from"),
        ("math500", FileNotFoundError, r"math500.jsonl does not exist; .* or read HuggingFaceH4/MATH-500 without"),
        (
            "svamp",
            FileNotFoundError,
            r"svamp.jsonl does not exist; put the set there, one object with question and",
        ),
        ("absent.csv", FileNotFoundError, r"data file 'absent.csv' does not exist"),
    ],
)
def test_what_is_not_there_is_said(tmp_path, name, error, message):
    with pytest.raises(error, match=message):
        load_benchmark(name, TaskConfig(), folder=tmp_path, size=None)


def test_names_are_found():
    assert find_benchmark("gsm8k").hub == HubSource("openai/gsm8k", "main", "test", "question", "answer")


def test_the_page_lists_every_set_with_its_hash_and_source():
    page = (Path(__file__).parents[2] / "docs/eval_reference.md").read_text()
    for name, b in BENCHMARKS.items():
        known = "not known" if b.sha256 is None else f"`{b.sha256[:12]}...`"
        assert f"| `{name}` | {b.title} | {b.rows} | {known} | " in page
        assert b.hub is None or f"`{b.hub.dataset}`, " in page
