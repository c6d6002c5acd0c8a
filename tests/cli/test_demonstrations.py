"""`hapo train` with demonstrations: a run, its records, and what is refused."""

import json

import pytest
import yaml

from hapo.cli import main
from hapo.cli.arms import split_task
from hapo.tasks import TaskConfig
from tests.cli import small


def test_a_run_learns_from_demonstrations_and_goes_on_after_an_error(tmp_path, monkeypatch):
    """From a checkpoint inside its first rollout batch it ends as the run that met none."""
    told = {"method": "egspo", "demonstrations": "addition", "demonstration_size": 20, "evaluate": False}
    told |= {"demonstration_method": "chord_phi", "demonstration_weight": '{"0": 0.5, "4": 0.1}', "max_steps": 4}
    told |= {"steps_per_generation": 1, "num_iterations": 2, "save_steps": 1, "max_num_gen_batches": 1}
    assert main(small.train(tmp_path / "whole", **told)) == 0
    with monkeypatch.context() as patch:
        patch.setenv("ACT", "raise")
        assert main(small.train(tmp_path / "cut", **told)) == 1
    assert main(["train", "--resume", str(tmp_path / "cut/checkpoints/checkpoint-1")]) == 0
    whole, cut = (small.metrics(tmp_path / name) for name in ("whole", "cut"))
    assert whole == cut and len(whole) == 4
    assert [line["demonstration_weight"] for line in whole] == pytest.approx([0.5, 0.4, 0.3, 0.2])
    assert all(line["demonstration_loss"] > 0 for line in whole)
    kept = yaml.safe_load((tmp_path / "whole/config.yaml").read_text())
    assert (kept["demonstrations"], kept["demonstration_method"]) == ("addition", "chord_phi")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"demonstration_weight": 1.0}, "demonstration_weight must be a number in [0, 1)"),
        ({"demonstration_method": "gspo"}, "method 'gspo' is a policy method"),
        ({"completion_column": "text"}, "completion_column='text' needs demonstrations"),
    ],
)
def test_a_wrong_option_is_told_what_is_right(tmp_path, capsys, options, message):
    assert main(small.train(tmp_path / "run", **options)) == 2
    assert message in capsys.readouterr().err


def test_options_without_demonstrations_and_rows_without_answers_are_refused(tmp_path, capsys):
    assert main(small.train(tmp_path / "run", demonstration_weight=0.2)) == 1
    assert "demonstration_weight=0.2 and no demonstrations" in capsys.readouterr().err
    file = tmp_path / "shown.jsonl"
    file.write_text(json.dumps({"question": "1+1", "answer": "2"}))
    assert main(small.train(tmp_path / "run", demonstrations=file)) == 1
    assert "Set messages_column or completion_column (beside question_column)" in capsys.readouterr().err
    assert not (tmp_path / "run/manifest.json").exists()


def test_demonstrations_of_tuning_problems_are_left_out():
    config = TaskConfig(train_size=40, eval_size=4, demonstrations="addition", demonstration_size=40)
    task, tuning = split_task(config, 0, 10)
    assert len(tuning) == 10 and not {*tuning["question"]} & {*task.demonstrations["question"]}
    assert {*task.demonstrations["question"]} == {
        *task.train["question"]
    }  # the embedded ones are of the same seed
