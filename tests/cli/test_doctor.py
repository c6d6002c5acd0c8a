"""`hapo doctor`: what it takes, what it prints, and its exit codes."""

from __future__ import annotations

import json
import logging
import warnings

import pytest

from hapo.cli import UsageError
from hapo.cli.doctor import main
from tests.cli.small import flags
from tests.insight.conftest import make_run

SMALL = flags(train_size=16, eval_size=4)


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def test_the_demo_is_healthy_and_the_default(capsys):
    assert main(SMALL) == 0
    assert capsys.readouterr().out == "nothing found\n"


def test_a_recipe_for_gpus_is_examined_on_a_machine_without_one(tmp_path, capsys):
    recipe = tmp_path / "gpu.yaml"
    options = {"bf16": True, "tf32": True, "use_vllm": True, "attn_implementation": "flash_attention_2"}
    told = {"model_name_or_path": "tiny", "dataset": "addition", "max_completion_length": 32, **options}
    recipe.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in told.items()))
    assert main([str(recipe), *SMALL]) == 0
    assert capsys.readouterr().out == "nothing found\n"


def test_a_recipe_with_flags_is_examined_and_the_ratio_is_said_once(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code = main(["demo", *SMALL, *flags(steps_per_generation=1, num_generations=2)])
    out = capsys.readouterr().out
    assert code == 3
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[0] == "warning: ratio_always_one"
    assert lines[1].startswith("  saw    one optimiser step a rollout batch (steps_per_generation 1")
    assert "  change --num_generations 8" in lines
    assert lines[-1] == "2 warnings"
    assert out.count("one optimiser step a rollout batch") == 1


def test_an_error_among_findings_decides_the_exit_code_and_json_has_them_all(capsys):
    assert main(["--json", *SMALL, *flags(num_generations=2, max_completion_length=20)]) == 4
    found = json.loads(capsys.readouterr().out)
    assert [(f["name"], f["severity"]) for f in found] == [
        ("few_problems", "error"),
        ("short_completions", "error"),
        ("small_groups", "warning"),
    ]
    assert {"name", "severity", "saw", "why", "change"} == set(found[0])


def test_the_context_that_the_recipe_gives_the_model_counts(capsys):
    enough = flags(model_init_kwargs='{"max_position_embeddings": 40}')
    assert main([*SMALL, *enough]) == 0
    short = flags(model_init_kwargs='{"max_position_embeddings": 39}')
    assert main([*SMALL, *short]) == 4
    assert "100 % of 16 prompts are longer than the other 7" in " ".join(capsys.readouterr().out.split())


def test_gold_answers_that_training_would_refuse_are_counted_not_raised(tmp_path, capsys, caplog):
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps({"question": f"q{i}", "answer": i % 9 or ""}) + "\n" for i in range(36)))
    given = flags(dataset=file, rewards="exact", train_size=20, eval_size=4)
    assert main(["demo", *given, "--json"]) == 4
    (finding,) = json.loads(capsys.readouterr().out)
    assert "4 of 36 gold answers (11 %) cannot be used: problems.jsonl, row 1: '' (empty)" in finding["saw"]
    assert caplog.text == ""
    assert logging.getLogger("hapo.tasks.data").level == logging.NOTSET


def test_a_run_is_examined(tmp_path, capsys):
    healthy = make_run(tmp_path / "healthy", tokens=False)
    assert main([str(healthy)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("note: loss_near_zero\n")
    assert out.endswith("1 note\n")
    stopped = make_run(tmp_path / "stopped", tokens=False, finished=False)
    assert main([str(stopped), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)[0]["change"] == f"hapo train --resume {stopped}"


def test_hostile_text_of_the_data_is_printed_as_it_stands(tmp_path, capsys):
    file = tmp_path / "problems.jsonl"
    golds = ["[bold]</script>[/]"] * 35 + [["\x1b[31m"]]
    file.write_text("".join(json.dumps({"question": f"q{i}", "answer": g}) + "\n" for i, g in enumerate(golds)))
    assert main(["demo", *flags(dataset=file, rewards="exact", train_size=20, eval_size=4)]) == 4
    out = capsys.readouterr().out
    assert "\x1b" not in out
    out = " ".join(out.split())
    assert "problems.jsonl, row 36: ['\\x1b[31m'] (no text and no number)" in out
    assert "the gold answer '[bold]</script>[/]' is that of 100 %" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.yaml"], "cannot read the recipe nowhere.yaml"),
        (["demo", "--methd", "dapo"], "unknown flag --methd; did you mean --method"),
        (["demo", "runs/demo"], "unexpected argument 'runs/demo'"),
    ],
)
def test_what_cannot_be_examined_is_a_mistake_of_usage(argv, message):
    with pytest.raises(UsageError, match=message):
        main(argv)


def test_a_run_takes_no_options_and_another_folder_is_refused(tmp_path):
    run = make_run(tmp_path / "run", tokens=False)
    with pytest.raises(UsageError, match="a run takes no flags but --json, got --method"):
        main([str(run), "--method", "dapo"])
    with pytest.raises(FileNotFoundError, match="is no run folder: it has no config.yaml"):
        main([str(tmp_path)])
