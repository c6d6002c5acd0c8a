"""`hapo eval --benchmarks`: figures by hand, the table, what is written, the preset, and what is refused."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from rich.console import Console
from scipy.stats import binomtest

from hapo.cli import main
from hapo.cli.benchmark import average, averages, figures_of, interval, mark_truncated_wrong, rows_of, table_of
from hapo.cli.measure import Answer
from hapo.tasks.benchmarks import ProblemSet
from tests.cli.small import flags

SCORES = [[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]


def problem_set(name: str = "small", size: int = 3, of: int = 3) -> ProblemSet:
    rows = [{"prompt": f"{i}?", "question": f"{i}", "answer": f"gold {i}"} for i in range(size)]
    return ProblemSet(name, Dataset.from_list(rows), of, lambda **_: [], "small.jsonl", "ab" * 32, True, 1)


def answers(scores: list[list[int]], truncated: bool = False) -> list[Answer]:
    return [
        Answer(i, k, f"text {i} {k}", 10 * i + k, float(score), truncated)
        for i, row in enumerate(scores)
        for k, score in enumerate(row)
    ]


def evaluate(*names: str, **options: object) -> list[str]:
    return ["eval", "--benchmarks", *names, *flags(**{"problems": 4, "samples": 2, **options})]


def test_figures_of_three_problems_by_hand():
    figures = figures_of(problem_set(), answers(SCORES))
    assert (figures["problems"], figures["samples"]) == (3, 4)
    # p = 5/12, variance 13/72: as 105/26 = 4.038 problems with 0 or 1
    assert figures["avg"] == pytest.approx({"mean": 5 / 12, "low": 0.110680, "high": 0.803906}, abs=1e-5)
    means = {k: one["mean"] for k, one in figures["pass"].items()}
    assert means == pytest.approx({"1": 5 / 12, "2": (1 + 1 / 2) / 3, "3": (1 + 3 / 4) / 3, "4": 2 / 3})
    wilson = binomtest(2, 3).proportion_ci(method="wilson")
    assert figures["pass"]["4"] == pytest.approx({"mean": 2 / 3, "low": wilson.low, "high": wilson.high})
    assert figures["mean_tokens"] == pytest.approx(11.5)
    assert (figures["truncated"], figures["unreadable_golds"], figures["verified"]) == (0.0, 1, True)


@pytest.mark.parametrize("right", [0, 3, 30])
def test_one_sample_has_wilsons_interval_and_no_set_one_without_width(right):
    wilson = binomtest(right, 30).proportion_ci(method="wilson")
    expected = {"mean": right / 30, "low": wilson.low, "high": wilson.high}
    assert interval(np.array([1.0] * right + [0.0] * (30 - right))) == pytest.approx(expected, abs=1e-12)


def test_interval_covers_the_mean_over_problems():
    rng = np.random.default_rng(0)
    draws = rng.binomial(8, rng.beta(0.3, 0.6, (2000, 83))) / 8
    found = [interval(draw) for draw in draws]
    assert np.mean([i["low"] <= 1 / 3 <= i["high"] for i in found]) == pytest.approx(0.95, abs=0.015)


def test_the_average_of_sets_is_unweighted_and_its_interval_that_of_independent_ones():
    sets = [{"mean": 0.2, "low": 0.17, "high": 0.3}, {"mean": 0.6, "low": 0.56, "high": 0.65}]
    expected = {"mean": 0.4, "low": 0.4 - 0.05 / 2, "high": 0.4 + np.sqrt(0.01 + 0.0025) / 2}
    assert average(sets) == pytest.approx(expected)
    one = figures_of(problem_set(), answers(SCORES))
    assert averages({"one": one})["pass"]["2"] == pytest.approx(one["pass"]["2"])


def test_truncated_answers_are_wrong_and_counted():
    cut = mark_truncated_wrong([*answers(SCORES[:1]), *answers(SCORES[:1], truncated=True)])
    assert [a.score for a in cut] == [1.0] * 4 + [0.0] * 4
    figures = figures_of(problem_set(size=1, of=1), cut)
    assert (figures["avg"]["mean"], figures["truncated"]) == (0.5, 0.5)


def test_the_table_shows_the_figures():
    one = figures_of(problem_set(of=9), answers(SCORES))
    other = figures_of(problem_set("other"), answers([[0, 0, 0, 0]] * 3))
    console = Console(width=110, file=io.StringIO(), record=True)
    console.print(table_of({"small": one, "other": other}))
    lines = [line.split("  ") for line in console.export_text().splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells == [
        ["set", "problems", "avg@4", "pass@2", "pass@4", "tokens", "truncated"],
        ["small", "3 of 9", "41.7 [11.1, 80.4]", "50.0", "66.7 [20.8, 93.9]", "12", "0.0"],
        ["other", "3", "0.0 [0.0, 56.1]", "0.0", "0.0 [0.0, 56.1]", "12", "0.0"],
        ["average", "20.8 [5.5, 54.9]", "25.0", "33.3 [10.4, 64.5]"],
    ]


def test_rows_have_what_was_asked_and_answered():
    row = rows_of(problem_set(), answers(SCORES))[5]
    assert row == {
        "set": "small", "question": "1", "gold": "gold 1", "problem": 1, "sample": 1, "text": "text 1 1",
        "tokens": 11, "score": 1.0, "truncated": False,
    }  # fmt: skip


def test_several_sets_make_one_table_one_parquet_and_one_json(tmp_path, capsys):
    mine, output = tmp_path / "mine.jsonl", tmp_path / "figures.json"
    mine.write_text('{"question": "12+34=", "answer": 46}\n{"question": "5+5=", "answer": "10"}\n')
    assert main(evaluate("addition", str(mine), problems=2, output=output)) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[:4]] == ["set", "addition", "mine", "average"]
    assert "mine: counted, not verified: no hash of these 2 problems is known" in shown
    figures = json.loads(output.read_text())
    assert list(figures["sets"]) == ["addition", "mine"]
    assert figures["sets"]["mine"]["source"] == str(mine)
    assert list(figures["weights"]) == ["model.safetensors"]
    assert len(figures["weights"]["model.safetensors"]) == 64
    assert {"torch", "transformers"} <= figures["versions"].keys()
    assert figures["protocol"] | {"preset": None, "samples": 2, "engine": "transformers"} == figures["protocol"]
    rows = pq.read_table(output.with_suffix(".parquet")).to_pylist()
    assert [(r["set"], r["problem"], r["sample"]) for r in rows] == [
        (name, i, k) for name in ("addition", "mine") for i in range(2) for k in range(2)
    ]
    for name, one in figures["sets"].items():
        scores = [r["score"] for r in rows if r["set"] == name]
        assert one["avg"]["mean"] == pytest.approx(sum(scores) / 4)
    mean = sum(one["avg"]["mean"] for one in figures["sets"].values()) / 2
    assert figures["average"]["avg"]["mean"] == pytest.approx(mean)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["figures.json", "figures.parquet", "mine.jsonl"]


def test_an_answer_cut_off_scores_nothing(tmp_path):
    output = tmp_path / "cut.json"
    assert main(evaluate("addition", problems=32, samples=1, max_completion_length=26, output=output)) == 0
    rows = pq.read_table(output.with_suffix(".parquet")).to_pylist()
    cut = [row for row in rows if row["truncated"]]
    assert 0 < len(cut) < len(rows)
    assert {row["tokens"] for row in cut} == {26}
    assert {row["score"] for row in cut} == {0.0}
    assert json.loads(output.read_text())["sets"]["addition"]["truncated"] == len(cut) / 32


@pytest.mark.parametrize(
    ("options", "expected", "words"),
    [
        (
            {"config": "demo"},
            (0.5, 0.7, 8, 32),
            "protocol: paper: temperature 0.5, top-p 0.7, 8 samples, at most 32",
        ),
        ({"model": "tiny"}, (0.5, 0.7, 8, 10240), "at most 10240 tokens"),
        (
            {"config": "demo", "top_p": 1.0, "samples": 2, "max_completion_length": 40},
            (0.5, 1.0, 2, 40),
            "protocol: paper except for top_p, samples: temperature 0.5, top-p 1, 2 samples, at most 40 tokens",
        ),
    ],
)
def test_the_preset_stands_over_the_recipe_and_under_the_flags(options, expected, words, tmp_path, capsys):
    output = tmp_path / "figures.json"
    argv = ["eval", "--benchmarks", "addition", "--preset", "paper", "--problems", "2", "--output", str(output)]
    assert main([*argv, *flags(**options)]) == 0
    protocol = json.loads(output.read_text())["protocol"]
    assert tuple(protocol[k] for k in ("temperature", "top_p", "samples", "max_new_tokens")) == expected
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (evaluate("aime2024"), "unknown benchmark 'aime2024' (did you mean aime24?)"),
        (evaluate("svamp", benchmark_folder="absent"), "absent/svamp.jsonl does not exist"),
        (evaluate("addition", "addition"), "benchmarks names addition more than once"),
        (evaluate("addition", temperature=0.0), "at temperature 0 all samples of a problem are the same"),
        (evaluate("addition", samples=0), "samples must be at least 1, got 0"),
        (evaluate("addition", problems=0), "problems must be at least 1, got 0"),
        (evaluate("addition", vllm_options="{}"), "vllm_options goes with --engine vllm"),
        (evaluate("addition", engine="vllm", vllm_options="{"), "vllm_options is no JSON: '{'"),
        (evaluate("addition", chat=True), "do not go with dataset addition"),
        (["eval", "--preset", "paper"], "preset goes with benchmarks, and none is named"),
        (["eval", "--problems", "3"], "problems goes with benchmarks, and none is named"),
    ],
)
def test_what_cannot_be_honoured_is_said(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_vllm_is_asked_for_by_name_where_it_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main(evaluate("addition", engine="vllm")) == 1
    assert (
        "--engine vllm needs vLLM: pip install vllm==0.32.* (what goes with it: docs/engines.md), or"
        in capsys.readouterr().err
    )


def test_two_files_of_one_name_are_refused(tmp_path, capsys):
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append(str(tmp_path / name / "mine.jsonl"))
        (tmp_path / name / "mine.jsonl").write_text('{"question": "1+1=", "answer": 2}\n')
    assert main(evaluate(*files, problems=1)) == 2
    assert "two benchmarks go by the name mine: rename a file" in capsys.readouterr().err
