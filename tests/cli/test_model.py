"""A GateRA adapter from the command line: its options, and a run that trains, goes on and is measured with it."""

import json
import math

import pytest
import yaml
from peft import LoraConfig
from safetensors.torch import load_file

from hapo.adapters import GateRAConfig
from hapo.cli import main
from hapo.cli.model import AdaptedModelConfig
from hapo.cli.recipe import RecipeParser
from tests.cli.small import flags, metrics, train


def parse(*argv: str) -> AdaptedModelConfig:
    (model, _) = RecipeParser("hapo train", "", [AdaptedModelConfig]).read(["--model", "tiny", *argv])
    return model


def test_a_mapping_gives_the_adapter_and_without_one_trl_s_options_do(tmp_path):
    found = parse("--gatera", '{"r": 4, "branch": "lora", "target_modules": ["q_proj"]}').adapter()
    assert isinstance(found, GateRAConfig)
    assert (found.r, found.branch, found.target_modules) == (4, "lora", {"q_proj"})
    assert found.task_type == "CAUSAL_LM" and found.entropy_weight == 0.01
    assert parse("--gatera", "{}").adapter() == GateRAConfig(task_type="CAUSAL_LM")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("gatera: {r: 8}\n")
    model = parse("--config", str(recipe))
    assert model.use_peft and model.adapter().r == 8
    assert parse().adapter() is None
    found = parse("--use_peft", "--lora_r", "3").adapter()
    assert isinstance(found, LoraConfig) and found.r == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gatera", "r=4"], "gatera is no JSON: 'r=4'"),
        (["--gatera", "4"], "gatera must be a mapping of options, got 4; {} takes the defaults"),
        (["--gatera", '{"brnch": 4}'], "gatera: GateRAConfig has no option 'brnch'; did you mean branch?"),
        (["--gatera", '{"r": 0}'], "r must be >= 1, got 0"),
        (["--gatera", "{}", "--lora_r", "8"], "lora_r=8 is LoRA's, and gatera names another adapter"),
        (["--gatera", "{}", "--use_dora"], "use_dora=True is LoRA's"),
    ],
)
def test_what_cannot_be_honoured_is_refused(argv, message, tmp_path, capsys):
    assert main([*train(tmp_path / "run"), *argv]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_trl_s_own_trainer_would_leave_out_the_loss_of_the_gates(tmp_path, capsys):
    argv = ["compare", *flags(output_dir=tmp_path / "c", max_steps=1, seeds=1), "--arms", "dapo", "trl:dapo"]
    assert main([*argv, "--gatera", "{}"]) == 2
    assert "trl:dapo: TRL's trainer leaves the entropy of the gates out" in capsys.readouterr().err


def test_a_run_trains_the_adapter_goes_on_and_is_measured(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(train(run, gatera='{"r": 4, "branch": "lora"}', max_steps=3, evaluate=False)) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["gatera"] == {"r": 4, "branch": "lora"}
    assert main(["train", "--resume", str(run), "--max_steps", "5"]) == 0
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(0 < line["gate/mean"] < 1 and 0 < line["gate_entropy"] <= math.log(2) for line in lines)
    assert json.loads((run / "model/adapter_config.json").read_text())["peft_type"] == "GATERA"
    saved = load_file(run / "model/adapter_model.safetensors")
    assert all("gatera_" in name for name in saved)
    assert any(x.any() for name, x in saved.items() if "gatera_B" in name)
    options = {"eval_size": 4, "max_completion_length": 8, "output": tmp_path / "found.json"}
    assert main(["eval", *flags(model=run / "model", **options)]) == 0
    assert json.loads((tmp_path / "found.json").read_text())
    cpu = {"use_cpu": True, "bf16": False, "activation_checkpointing": False}
    assert main(train(tmp_path / "other", model=run / "model", **cpu)) == 2
    assert "model is an adapter, and training begins with a whole model" in capsys.readouterr().err
