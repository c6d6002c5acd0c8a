"""`hapo train` with an environment and a method that draws groups."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hapo.cli import main
from tests.cli.small import evaluations, flags, metrics

OPTIONS = {
    "environment": "addition",
    "train_size": 32,
    "eval_size": 6,
    "method": "grpo",
    "beta": 0.0,
    "num_generations": 4,
    "max_num_gen_batches": 1,
    "draw_ahead": False,
    "per_device_train_batch_size": 16,
    "steps_per_generation": 2,
    "max_completion_length": 12,
    "learning_rate": 1e-4,
    "max_steps": 3,
    "save_steps": 2,
    "logging_steps": 1,
    "report": False,
}
TURNS = {"method_options": '{"advantage": "turn_reward", "finished": "out"}'}


def train(folder, **options):
    return ["train", *flags(**{**OPTIONS, "output_dir": folder, **options})]


def test_a_run_is_measured_by_whole_episodes_and_resumes(tmp_path):
    """Turns have credit of their own; a step goes on inside a rollout as it would have gone."""
    assert main(train(tmp_path / "whole", **TURNS)) == 0
    measured = evaluations(tmp_path / "whole")
    assert [(line["step"], line["how"]) for line in measured] == [
        (step, how) for step in (0, 3) for how in ("greedy", "sampled")
    ]
    assert measured[0]["mean"] > 0.2  # the bundled model adds now and then
    assert any(line["grad_norm"] > 0 for line in metrics(tmp_path / "whole"))
    assert "rewards/turn_reward/mean" in metrics(tmp_path / "whole")[0]
    told = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert (told["environment"], told["method"]) == ("addition", "grpo")
    ends = yaml.safe_load((tmp_path / "whole" / "model" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == 1  # the semicolon ends turns here, not texts elsewhere
    one = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert main(["train", "--resume", str(tmp_path / "whole" / "checkpoints" / "checkpoint-2")]) == 0
    other = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"environment": "addtion"}, "there is no environment 'addtion'; known: addition, code"),
        ({"rewards": "exact"}, "rewards=['exact'] does not go with environment='addition'"),
        ({"environment_options": "[1]"}, "environment_options must be a mapping, not [1]"),
        ({"environment_options": "{"}, "environment_options is no JSON: '{'"),
        ({"environment": "none", "environment_options": "{}"}, "environment_options={} needs environment"),
    ],
)
def test_what_cannot_be_played_is_refused(tmp_path, capsys, options, message):
    assert main(train(tmp_path / "run", **options)) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_single_answers_are_no_episodes(capsys):
    assert main(["eval", "--model", "tiny", "--environment", "addition", "--use_cpu"]) == 2
    assert "environment='addition': episodes are measured by hapo train" in capsys.readouterr().err
    assert main(["curriculum", "--environment", "addition"]) == 2
    assert "a curriculum is of problems with one answer" in capsys.readouterr().err
