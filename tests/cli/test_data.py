"""Rows of verl, prompts as messages, and rewards that are async or do not apply, through the commands."""

import json

import pytest
from transformers import AutoTokenizer

from hapo.assets import tiny_model_path
from hapo.cli import main
from tests.cli.small import evaluations, flags, metrics, train

EXTRAS = [{"index": 0}, {"index": 1, "note": {"a": 1}}, {"index": 2, "tests": [{"in": 1}, {"out": 2}]}]

REWARD = '''
import asyncio, json, pathlib

async def even(prompts, completions, extra_info, data_source, reward_model, **columns):
    """Applies to the rows with an even index alone; what it sees is written down."""
    await asyncio.sleep(0)
    with (pathlib.Path(__file__).parent / "seen.jsonl").open("a") as file:
        for row in zip(prompts, extra_info, data_source, reward_model, columns["answer"]):
            print(json.dumps(row), file=file)
    scores = [float(sum(map(ord, c[-1]["content"])) % 2) for c in completions]
    return [None if extra["index"] % 2 else score for extra, score in zip(extra_info, scores)]

def odd(completions, extra_info, **columns):
    scores = [float(len(c[-1]["content"]) % 2) for c in completions]
    return [score if extra["index"] % 2 else None for extra, score in zip(extra_info, scores)]
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The bundled model, with a chat template."""
    folder = tmp_path_factory.mktemp("model")
    for file in tiny_model_path().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path):
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"{i + 100}+111="}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(i + 211)},
            "extra_info": {**EXTRAS[i % 3], "index": i},
        }
        for i in range(16)
    ]
    for name, part in (("train", rows[:12]), ("test", rows[12:])):
        (tmp_path / f"data_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "mine.py").write_text(REWARD)
    return rows


def test_a_run_on_rows_of_verl_gives_rewards_what_the_rows_say(tmp_path, model, rows, capsys):
    mine = tmp_path / "mine.py"
    argv = train(tmp_path / "run", model=model, dataset=tmp_path, test_split="test", evaluate=True, max_steps=3)
    argv += ["--rewards", f"{mine}:even", f"{mine}:odd", *flags(train_size=12, eval_size=4)]
    assert main([*argv, "--config", "demo"]) == 0, capsys.readouterr().err
    written = {
        json.dumps(r["prompt"]): [
            r["prompt"], r["extra_info"], r["data_source"], r["reward_model"], r["reward_model"]["ground_truth"]
        ]
        for r in rows
    }  # fmt: skip
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert {json.dumps(row[0]) for row in seen} > {json.dumps(row["prompt"]) for row in rows[12:]}
    assert all(row == written[json.dumps(row[0])] for row in seen)
    assert len(metrics(tmp_path / "run")) == 3
    assert all(0 < line.get("reward", 0.5) < 1 for line in metrics(tmp_path / "run"))  # one a rollout batch
    assert any(line["grad_norm"] > 0 for line in metrics(tmp_path / "run"))
    assert {line["problems"] for line in evaluations(tmp_path / "run")} == {4}


def test_a_row_to_which_no_reward_applies_counts_nowhere_in_training_and_as_0_in_accuracy(
    tmp_path, model, rows, caplog
):
    argv = train(tmp_path / "run", model=model, dataset=tmp_path, test_split="test", evaluate=True, max_steps=1)
    argv += ["--rewards", f"{tmp_path / 'mine.py'}:even", *flags(train_size=12, eval_size=4), "--config", "demo"]
    assert main(argv) == 0
    assert "2 of 4 answers got a number from no reward (all say None) and count as 0" in caplog.text
    for line in evaluations(tmp_path / "run"):
        assert line["scores"][1] == line["scores"][3] == 0
    (line,) = metrics(tmp_path / "run")
    assert line["loss"] == line["loss"]


def test_eval_measures_on_a_folder_of_rows_of_verl(tmp_path, model, rows):
    output = tmp_path / "figures.json"
    argv = ["eval", "--model", str(model), "--benchmarks", str(tmp_path), "--samples", "2"]
    assert main([*argv, *flags(output=output, max_completion_length=8)]) == 0
    figures = json.loads(output.read_text())
    assert figures["sets"][tmp_path.name]["problems"] == 4
