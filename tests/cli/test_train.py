"""`hapo train` and `hapo eval`: what a run leaves behind, what it repeats, and how it ends early."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hapo.cli import main
from hapo.cli.run_folder import check_same_data
from hapo.engines.estimate import Estimate
from hapo.tasks import TaskConfig, load_task
from tests.cli.small import accuracy, evaluations, flags, metrics, train

WEIGHTS = "model/model.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(train(folder, report=True)) == 0
    return folder


def test_a_run_leaves_records_checkpoints_accuracy_and_the_model(finished):
    names = {
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "tokens",
        "checkpoints",
        "evaluations.jsonl",
        "finished.json",
        "model",
        "report.html",
    }
    assert names <= {p.name for p in finished.iterdir()}
    assert [m["step"] for m in metrics(finished)] == [1, 2, 3, 4, 5]
    assert any(m["grad_norm"] > 0 for m in metrics(finished))
    measured = evaluations(finished)
    assert [(m["step"], m["how"]) for m in measured] == [(s, h) for s in (0, 5) for h in ("greedy", "sampled")]
    for found in measured:
        assert found["problems"] == len(found["scores"]) == 6
        assert sum(found["scores"]) / 6 == pytest.approx(found["mean"], abs=1e-6)
        assert 0 <= found["low"] <= found["mean"] <= found["high"] <= 1
    end = json.loads((finished / "finished.json").read_text())
    assert (end["steps"], end["why"]) == (5, "max_steps")
    assert 0 < measured[-1]["num_tokens"] == end["num_tokens"]


def test_the_model_card_says_what_the_model_is_and_loads_it(finished, monkeypatch):
    card = ModelCard.load(finished / "README.md")
    assert card.data.library_name == "transformers"
    measured = Estimate.of(evaluations(finished)[-1])
    for fact in (
        "| base model | `tiny`, the small model that hapo brings |",
        "| task | `addition` |",
        "| rewards | `parity` |",
        "| learning rate | 0.001, constant |",
        f"| held out, sampled | {measured} on 6 problems, after step 5 |",
        f"| seed | {yaml.safe_load((finished / 'config.yaml').read_text()).get('seed', 42)} |",
        "method: hapo\n",
        "eprint = {2509.16591}",
    ):
        assert fact in card.text
    assert str(finished.parent) not in card.content  # no path of the machine
    assert "/assets/" not in card.content
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    monkeypatch.chdir(finished)
    loaded: dict = {}
    exec(snippet, loaded)
    problem = loaded["tokenizer"]("123+456=", return_tensors="pt")
    trained = load_file(finished / WEIGHTS)["model.embed_tokens.weight"]
    assert torch.equal(loaded["model"].get_input_embeddings().weight, trained)
    assert loaded["model"](**problem).logits.isfinite().all()


def test_config_yaml_is_a_recipe_and_an_interrupted_run_resumes_to_the_same_weights(
    finished, tmp_path, monkeypatch, capsys
):
    again = tmp_path / "again"
    monkeypatch.setenv("ACT", "1")
    argv = ["train", "--config", str(finished / "config.yaml"), "--output_dir", str(again)]
    assert main(argv) == 130
    out, err = capsys.readouterr()
    assert "finishing this optimiser step" in out
    assert f"checkpoint-3 is saved; resume with: hapo train --resume {again}" in err
    assert [m["step"] for m in metrics(again)] == [1, 2, 3]
    before = evaluations(again)
    assert not (again / "finished.json").exists()

    monkeypatch.delenv("ACT")
    assert main(["train", "--resume", str(again)]) == 0
    assert metrics(again) == metrics(finished)
    assert (again / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()
    assert evaluations(again)[:2] == before
    assert [accuracy(m) for m in evaluations(again)] == [accuracy(m) for m in evaluations(finished)]


def test_a_run_does_not_go_on_with_other_data(tmp_path, monkeypatch, capsys):
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    lines = [json.dumps({"question": f"{i}+111=", "answer": i + 111}) + "\n" for i in range(100, 140)]
    data.write_text("".join(lines))
    monkeypatch.setenv("ACT", "1")
    assert main(train(run, dataset=data, evaluate=False)) == 130
    data.write_text("".join(lines[:-1]).replace("100+111", "100+112") + lines[-1])
    monkeypatch.delenv("ACT")
    before = hashes(run)
    assert main(["train", "--resume", str(run)]) == 1
    assert "the training data of " in capsys.readouterr().err
    assert hashes(run) == before
    data.write_text("".join(lines))
    assert main(["train", "--resume", str(run)]) == 0


def test_processes_with_different_data_are_refused():
    task = load_task(TaskConfig(train_size=2, eval_size=1), seed=0)
    check_same_data(task.name, task.train._fingerprint, [task.fingerprint] * 2, {})
    with pytest.raises(ValueError, match="the processes of this run have different data"):
        check_same_data(task.name, task.train._fingerprint, [task.fingerprint, "another"], {})


def hashes(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_finished_run_is_not_trained_on_and_can_be_prolonged(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = hashes(run)
    assert main(["train", "--resume", str(run)]) == 0
    assert f"{run} is finished: 5 optimiser steps (max_steps). Nothing to do" in capsys.readouterr().out
    assert hashes(run) == before
    assert main(["train", "--resume", str(run), "--max_steps", "5"]) == 2
    assert "the run has 5 optimiser steps: --max_steps must be above that, got 5" in capsys.readouterr().err
    assert hashes(run) == before

    assert main(["train", "--resume", str(run), "--max_steps", "7"]) == 0
    assert main(train(tmp_path / "whole", max_steps=7)) == 0
    assert metrics(run) == metrics(tmp_path / "whole")
    assert (run / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert yaml.safe_load((run / "config.yaml").read_text())["max_steps"] == 7
    assert json.loads((run / "finished.json").read_text())["steps"] == 7


@pytest.mark.parametrize("gone", [["finished.json", "model", "report.html"], ["report.html"]])
def test_a_run_that_was_killed_after_its_last_step_gets_what_it_lacks_and_no_step_more(finished, tmp_path, gone):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in gone:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    assert main(["train", "--resume", str(run)]) == 0
    assert metrics(run) == metrics(finished)
    assert (run / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()
    assert evaluations(run) == evaluations(finished)
    one, other = (json.loads((folder / "finished.json").read_text()) for folder in (run, finished))
    assert [one[name] for name in ("steps", "num_tokens", "why")] == [5, other["num_tokens"], "max_steps"]
    assert "<html" in (run / "report.html").read_text()


def test_training_does_not_depend_on_whether_accuracy_is_measured(finished, tmp_path):
    assert main([*train(tmp_path / "run"), "--no_evaluate"]) == 0
    assert not (tmp_path / "run/evaluations.jsonl").exists()
    assert metrics(tmp_path / "run") == metrics(finished)


def test_accuracy_is_measured_along_the_way_and_a_token_budget_ends_the_run_with_its_rollout_batch(
    finished, tmp_path
):
    half = evaluations(finished)[-1]["num_tokens"] // 2
    run = tmp_path / "run"
    assert main([*train(run), *flags(evaluate_every=1, evaluate_samples=2, token_budget=half)]) == 0
    measured = evaluations(run)
    assert [m["step"] for m in measured] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert {m["samples"] for m in measured if m["how"] == "sampled"} == {2}
    assert [m["seconds"] for m in measured] == sorted(m["seconds"] for m in measured)
    assert json.loads((run / "finished.json").read_text())["why"] == "token_budget"
    assert metrics(run) == metrics(finished)[:4]


def test_a_second_interrupt_stops_at_once_and_the_last_checkpoint_stays(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "hapo.cli", *train(tmp_path / "run", evaluate=False)],
        env={**os.environ, "ACT": "2"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 130, run.stderr
    assert "Traceback" not in run.stderr
    assert f"checkpoint-2 is saved; resume with: hapo train --resume {tmp_path / 'run'}" in run.stderr


def test_a_reward_that_raises_ends_the_run_with_its_message_and_loses_nothing(
    finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ACT", "raise")
    assert main(train(tmp_path / "run", evaluate=False)) == 1
    err = capsys.readouterr().err
    assert "checkpoint-2 is saved" in err
    assert "reward 'parity' raised KeyError: 'gold' on sample 0 of " in err
    monkeypatch.delenv("ACT")
    assert main(["train", "--resume", str(tmp_path / "run/checkpoints/checkpoint-2")]) == 0
    assert metrics(tmp_path / "run") == metrics(finished)


def test_a_module_that_a_reward_lacks_is_named_and_not_taken_for_one_of_ours(tmp_path, capsys):
    reward = tmp_path / "lacking.py"
    reward.write_text("import no_such_module\n")
    assert main(train(tmp_path / "run", rewards=f"{reward}:parity")) == 1
    error = capsys.readouterr().err
    assert "error: No module named 'no_such_module'\n" in error and "pip install" not in error


def test_debugging_raises(tmp_path, monkeypatch):
    monkeypatch.setenv("HAPO_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        main(train(tmp_path / "run", dataset=tmp_path / "absent.jsonl"))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"dataset": "absent.jsonl"}, 1, "data file 'absent.jsonl' does not exist"),
        ({"rewards": "exakt"}, 1, "unknown reward 'exakt' (did you mean exact?)"),
        ({"model": "no/such/model"}, 2, "model_name_or_path 'no/such/model'"),
        ({"run_records": False}, 2, "run_records cannot be off"),
        ({"resume_from_checkpoint": "x"}, 2, "resume with `hapo train --resume RUN`"),
        ({"resume": "x"}, 2, "--resume RUN goes alone, or with --max_steps N"),
        ({"threads": 0}, 2, "threads must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_honoured_is_said(options, code, message, tmp_path, capsys):
    if "model" in options:
        options = {**options, "config": "demo"}
    assert main(train(tmp_path / "run", **options)) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run/manifest.json").exists()


def test_a_run_folder_that_exists_or_cannot_be_written_is_refused_before_loading(finished, tmp_path, capsys):
    assert main(train(finished)) == 2
    assert f"the run folder {finished} exists" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([*train(tmp_path / "run"), "--output_dir", str(tmp_path / "file/run")]) == 1
    assert "cannot be written to (Not a directory): choose another output_dir" in capsys.readouterr().err


def test_a_folder_without_a_run_is_not_resumed(tmp_path, capsys):
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "is no run to resume" in capsys.readouterr().err


def test_eval_measures_a_model_of_a_run_and_writes_every_answer(finished, tmp_path, capsys):
    output = tmp_path / "figures.json"
    argv = ["eval", "--config", str(finished / "config.yaml"), "--model", str(finished / "model")]
    assert main([*argv, *flags(samples=3, output=output)]) == 0
    figures = json.loads(output.read_text())
    after = accuracy(evaluations(finished)[-2])
    assert {k: v for k, v in figures["greedy"].items() if k in after} == after
    assert figures["sampled"]["samples"] == 3
    rows = pq.read_table(output.with_suffix(".parquet")).to_pylist()
    assert len(rows) == 6 + 6 * 3
    scores = [row["score"] for row in rows if row["decoding"] == "sampled"]
    assert figures["sampled"]["mean"] == pytest.approx(sum(scores) / 18)
    assert capsys.readouterr().out.startswith("greedy: ")


def test_lora_trains_an_adapter_that_eval_loads(tmp_path):
    run = tmp_path / "run"
    options = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "max_steps": 2, "beta": 0.01}
    assert main(train(run, evaluate=False, **options)) == 0
    assert (run / "model/adapter_config.json").is_file()
    assert ModelCard.load(run / "README.md").data.library_name == "peft"
    assert (
        main(["eval", "--config", str(run / "config.yaml"), "--model", str(run / "model"), "--samples", "1"]) == 0
    )


@pytest.mark.xdist_group("two_ranks")
def test_two_processes_train_and_measure_every_problem_once(two_ranks):
    assert [m["problems"] for m in evaluations(two_ranks / "cli/demo")] == [7] * 4
    assert (two_ranks / "stdout.txt").read_text().count("problems, 95 % intervals") == 1
