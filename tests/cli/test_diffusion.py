"""`hapo train` with a method of diffusion models: measured, resumed, and refused where tokens come one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hapo
from hapo.assets import tiny_model_path
from hapo.cli import main
from hapo.cli.arms import Arm, Job, Recipe
from hapo.cli.compare import config_of_arms
from hapo.cli.one_run import build
from hapo.cli.recipe import read_recipe
from hapo.cli.train import config_of
from hapo.parts.elbo import Elbo
from hapo.trl import DiffusionConfig, DiffusionTrainer, HAPOConfig
from tests.cli.small import evaluations, flags, metrics, train

OPTIONS = {"method": "espo", "block_length": 6, "diffusion_steps": 4, "max_num_gen_batches": 1, "max_steps": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random Llama with full attention, and the tokenizer of the bundled model with a mask token."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, is_causal=False, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_run_is_measured_and_resumes_inside_a_rollout(model, tmp_path):
    """Two optimiser steps a use, two uses: the checkpoint after the second step is half way through a rollout."""
    options = {**OPTIONS, "model_name_or_path": model, "num_iterations": 2, "threads": 1, "use_cpu": True}
    options |= {"bf16": False, "activation_checkpointing": False, "report_to": "none", "dataset": "addition"}
    assert main(train(tmp_path / "whole", **options)) == 0
    measured = [(line["step"], line["how"]) for line in evaluations(tmp_path / "whole")]
    assert measured == [(step, how) for step in (0, 3) for how in ("greedy", "sampled")]
    assert any(line["grad_norm"] > 0 for line in metrics(tmp_path / "whole"))
    assert main(train(tmp_path / "part", **options, evaluate=False)) == 0
    checkpoint = tmp_path / "part" / "checkpoints" / "checkpoint-2"
    assert main(["train", "--resume", str(checkpoint)]) == 0
    one, other = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    start = load_file(model / "model.safetensors")
    assert any(not torch.equal(one[name], start[name]) for name in start)


@pytest.mark.parametrize("name", hapo.methods("policy"))
def test_the_class_of_the_options_is_that_of_the_method(name, tmp_path):
    expected = DiffusionConfig if name in ("espo", "diffu_grpo") else HAPOConfig
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: {name}\n")
    assert config_of(["--method", name]) is config_of(["--config", str(recipe)]) is expected
    assert config_of(["--config", str(recipe), "--method=grpo"]) is HAPOConfig


def test_without_a_model_the_embedded_one_is_trained(tmp_path):
    """`hapo train --method espo` alone, or the recipe by its name; --method diffu_grpo takes its place."""
    small = flags(
        train_size=8, eval_size=4, max_steps=2, report=False, per_device_train_batch_size=16, save_steps=2,
        evaluate_every=2,
    )  # fmt: skip
    for name, told in (("espo", ["--config", "diffusion"]), ("diffu_grpo", ["--method", "diffu_grpo"])):
        folder = tmp_path / name
        options = ["--method_options", "{}"] if name == "diffu_grpo" else []
        assert main(["train", *told, *options, *small, "--output_dir", str(folder)]) == 0
        told_of = yaml.safe_load((folder / "config.yaml").read_text())
        assert (told_of["method"], told_of["model_name_or_path"]) == (name, "diffusion_tiny")
        assert told_of["max_completion_length"] == 14
        assert "`diffusion_tiny`, the small model that hapo brings" in (folder / "README.md").read_text()
    assert config_of(["--config", "diffusion"]) is DiffusionConfig


def test_the_doctor_finds_nothing_in_the_embedded_recipe(capsys):
    assert main(["doctor", "--method", "espo"]) == 0
    assert "short_completions" not in capsys.readouterr().out
    assert main(["doctor", "--method", "espo", "--max_completion_length", "3"]) != 0
    assert "short_completions" in capsys.readouterr().out


def test_methods_of_diffusion_models_are_compared_among_themselves(tmp_path, capsys):
    """The committed plan, an arm with options that their class of options alone has; and no mixture."""
    recipe = Recipe(read_recipe(str(Path(__file__).parents[2] / "bench" / "compare" / "espo.yaml")), [])
    arm = Arm("espo:beta=0.01,coupled=false,draws=4,diffusion_steps=7,kl_estimator=k3")
    job = Job(arm, 3, tmp_path / "run", recipe, {"evaluate": True, "report": False, "save_strategy": "no"})
    trainer = build(job).trainer
    assert isinstance(trainer, DiffusionTrainer) and trainer.method.likelihood == Elbo(draws=4, coupled=False)
    assert (trainer.args.diffusion_steps, trainer.args.beta, trainer.args.seed) == (7, 0.01, 3)
    assert trainer.method.options["kl_estimator"] == "k3"
    assert main(["compare", "--arms", "espo", "dapo", "--output_dir", str(tmp_path / "mixed")]) == 2
    assert "espo train masked-diffusion models, and the other arms do not" in capsys.readouterr().err
    assert config_of_arms(["--seeds", "2", "--arms", "espo:beta=0.1", "diffu_grpo"]) is DiffusionConfig
    assert config_of_arms(["--config", "diffusion", "--seeds", "2"]) is DiffusionConfig
    assert config_of_arms(["--arms", "dapo", "--seeds", "2"]) is config_of_arms([]) is HAPOConfig


def test_what_writes_from_left_to_right_refuses_the_model(model, capsys):
    assert main(["eval", "--model", str(model), "--dataset", "addition", "--eval_size", "2", "--use_cpu"]) != 0
    assert "attends in both directions" in capsys.readouterr().err
    assert main(["train", "--method", "gspo", "--model", str(model), "--block_length", "4"]) != 0
    assert "unknown flag --block_length" in capsys.readouterr().err
