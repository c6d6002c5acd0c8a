"""Recipes and flags: what wins, and what a mistake is told."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from trl import ModelConfig

from hapo.cli import UsageError, main
from hapo.cli.model import AdaptedModelConfig
from hapo.cli.recipe import RecipeParser, read_recipe, told
from hapo.cli.train import TrainOptions, config_of
from hapo.tasks import TaskConfig
from hapo.trl import DiffusionConfig
from tests.cli.small import flags

KINDS = [TaskConfig, DiffusionConfig, AdaptedModelConfig, TrainOptions]
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
CPU = ["--use_cpu", "--bf16", "false", "--activation_checkpointing", "false"]


def parse(*argv: str) -> tuple:
    """As `hapo train` does, without asking for a GPU."""
    kinds = [TaskConfig, config_of([*argv]), AdaptedModelConfig, TrainOptions]
    return RecipeParser("hapo train", "", kinds).read([*argv, *CPU])


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model_name_or_path: tiny\nlearning_rate: 2e-6\nmax_steps: 7\nmethod_options: {temperature: {tau: 0.05}}\n"
    )
    _, args, model, _, _ = parse("--config", str(recipe), "--max_steps", "9")
    assert (args.learning_rate, args.max_steps, args.method_options) == (2e-6, 9, {"temperature": {"tau": 0.05}})
    assert (model.model_name_or_path, args.num_generations) == ("tiny", 8)


def test_the_demo_is_the_recipe_where_neither_recipe_nor_model_is_named():
    demo = read_recipe("demo")
    task, args, model, options, _ = parse("--seed", "3")
    assert (args.max_steps, args.seed, options.threads) == (demo["max_steps"], 3, demo["threads"])
    assert (task.dataset, model.model_name_or_path) == ("addition", "tiny")
    assert parse("--model", "other")[1].max_steps == -1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methd", "dapo"], "unknown flag --methd; did you mean --method?"),
        (["--method", "dappo"], "there is no method 'dappo'; did you mean 'dapo'?"),
        (["--method_options", '{"eps_hihg": 0.3}'], "no option 'eps_hihg'; did you mean 'eps_high'?"),
        (["--method_options", '{"components": "AX"}'], "components must be made of the letters A, B, C and D"),
        (["--method_options", '{"temperature": {"tau": 1.5}}'], "tau must be in [0, 1)"),
        (["--epsilon", "0.3"], 'set method_options={"eps_low": 0.3}'),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["demo"], "unexpected argument 'demo'"),
        (["--config", "dmeo"], "cannot read the recipe dmeo (No such file or directory); embedded recipes: demo"),
    ],
)
def test_a_wrong_flag_is_told_what_is_right(argv, message, capsys):
    assert main(["train", *argv, *CPU]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model_name_or_path: tiny\nlerning_rate: 1\n",
            "unknown option 'lerning_rate'; did you mean learning_rate?",
        ),
        ("model_name_or_path: tiny\nmethod: [a\n", "recipe.yaml, line 3: malformed YAML"),
        ("- tiny\n", "a recipe is a mapping of options to values"),
        ("model_name_or_path: tiny\nrewards: []\n", "rewards is empty"),
    ],
)
def test_a_wrong_recipe_is_told_where(text, message, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(UsageError, match=".*") as error:
        parse("--config", str(recipe))
    assert message in str(error.value)


def test_told_holds_the_options_that_differ_from_their_defaults():
    options = told(TaskConfig(eval_size=9, rewards=["exact"]), ModelConfig("tiny", lora_r=4))
    assert options == {"eval_size": 9, "rewards": ["exact"], "model_name_or_path": "tiny", "lora_r": 4}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_says_its_command(recipe):
    header = recipe.read_text().split("\nmodel_name_or_path")[0]
    assert {"Hardware", "Time", "Command"} <= {line[2:].split(":")[0] for line in header.splitlines()}
    assert f"recipes/{recipe.name}" in header
    if recipe.stem == "etpo_code":  # of another loop: test_agent.py reads it
        return
    _, args, _, _, _ = parse("--config", str(recipe))
    methods = {"chord_phi": "grpo", "egspo": "egspo", "espo": "espo", "grpo_code": "grpo", "shape": "grpo"}
    assert args.method == next((m for begin, m in methods.items() if recipe.stem.startswith(begin)), "hapo")


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.name.startswith("hapo_")], ids=lambda path: path.stem)
def test_the_paper_recipes_take_16_updates_of_512_answers_from_512_problems(recipe):
    gpus = 8
    _, args, _, _, _ = parse("--config", str(recipe))
    step = args.per_device_train_batch_size * gpus * args.gradient_accumulation_steps
    assert (step, args.updates_per_rollout) == (512, 16)
    assert step * args.updates_per_rollout / args.num_generations == 512
    assert args.overlong_buffer == (0 if "llama" in recipe.stem else 4096)


def test_no_flag_is_claimed_twice():
    names = [f.name for kind in KINDS for f in fields(kind) if f.init]
    assert len(names) == len(set(names))


def test_help_renders(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    out = capsys.readouterr().out
    for flag in ("--config", "--resume", "--dataset", "--method", "--lora_r", "--evaluate"):
        assert flag in out


@pytest.mark.parametrize("name", ["/nowhere/model", "../nowhere", "no-one/has-this"])
@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (["train"], "model_name_or_path"),
        (["train", "--method", "etpo"], "model_name_or_path"),
        (["sft"], "model_name_or_path"),
        (["eval"], "model_name_or_path"),
        (["curriculum"], "model_name_or_path"),
        (["doctor"], "model_name_or_path"),
        (["calibrate", "--rule", "bounded"], "model"),
        (["shape"], "token_reward.model"),
        (["train", "--config", "shape"], "token_reward.model"),
    ],
)
def test_a_model_that_is_not_there_is_named_with_its_option(argv, option, name, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1="}\n')
    if argv[0] == "calibrate":
        given = {"model": name, "output": tmp_path / "out.json", "prompts": tmp_path / "prompts.jsonl"}
    else:
        given = {"use_cpu": True, "output_dir": tmp_path / "run"}
        reward = {"model": name, "channels": ["shap", "sparse"]}
        if argv[0] == "train":
            reward["weights"] = [0.5, 0.5]
        if option == "model_name_or_path":
            given |= {"model": name} | ({} if "etpo" in argv else {"dataset": "addition"})
            if argv[0] in ("train", "sft") and "etpo" not in argv:
                given |= {"bf16": False, "activation_checkpointing": False}
        else:
            given["token_reward"] = json.dumps(reward)
    assert main([*argv, *flags(**given)]) in (1, 2)
    said = capsys.readouterr().err
    assert f"{option} {name!r} {'cannot be read' if name == 'no-one/has-this' else 'is no folder'}" in said
    assert "name a folder with a" in said and "Hub" in said
