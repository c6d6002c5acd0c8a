"""`hapo train` with an environment and a method that draws groups."""

import warnings
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hapo.cli import main
from tests.cli.small import evaluations, flags, metrics
from tests.engines.test_trl_tools import speaking

RECIPES = Path(__file__).parents[2] / "recipes"

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


def test_the_recipe_for_code_runs_with_a_random_model(tmp_path):
    """Its programs are noise: each fails, is told so, and tries again."""
    tokenizer = speaking()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4096, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    small = {
        "config": RECIPES / "grpo_code.yaml", "model_name_or_path": tmp_path / "model", "output_dir": tmp_path / "run",
        "dtype": "float32", "use_cpu": True, "bf16": False, "report_to": "none", "environment_options": '{"max_turns": 2}',
        "num_generations": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "steps_per_generation": 1, "max_steps": 1, "max_completion_length": 4, "train_size": 4, "eval_size": 1,
        "logging_steps": 1, "report": False, "record_tokens_every": 1, "activation_checkpointing": False,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One optimiser step a rollout batch")
        assert main(["train", *flags(**small)]) == 0
    (line,) = metrics(tmp_path / "run")
    assert line["reward"] == -1
    assert [measured["mean"] for measured in evaluations(tmp_path / "run")] == [-1] * 4
    (file,) = (tmp_path / "run" / "tokens").iterdir()
    assert len(set(pq.read_table(file)["response"].to_pylist())) == 4
