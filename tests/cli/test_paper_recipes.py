"""A recipe of the paper, run for two steps with a tiny random model of its architecture in the place of its own.

One stands for the six: they differ in numbers that `test_recipe.py` reads, and in architectures that
`test_scoring.py` scores.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from hapo.cli import main
from tests.cli.small import REWARD, flags, metrics

RECIPES = Path(__file__).parents[2] / "recipes"
WORDS = ["<pad>", "<eos>", "?", *"0123456789", "What", "is", "Solve", "Answer", "problem", "step"]


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    """Rows with the columns of the data set on the Hub."""
    rows = [{"prompt": f"What is {i} + {i}?", "solution": str(2 * i), "data_source": "x"} for i in range(17)]
    file = tmp_path_factory.mktemp("data") / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tiny_model(folder: Path) -> Path:
    config = Qwen3Config(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="?",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}Answer",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_a_paper_recipe_trains_a_tiny_model_of_its_architecture(problems, tmp_path):
    recipe = RECIPES / "hapo_qwen3_8b.yaml"
    reward = tmp_path / "reward.py"
    reward.write_text(
        REWARD.replace("for text in completions", "for text in [c[-1]['content'] for c in completions]")
    )
    stand_in = flags(
        model=tiny_model(tmp_path / "tiny"), dataset=problems, rewards=f"{reward}:parity",
        output_dir=tmp_path / "run", num_generations=4, max_num_gen_batches=3, max_completion_length=6,
        overlong_buffer=3, per_device_train_batch_size=8, gradient_accumulation_steps=1, steps_per_generation=2,
        max_steps=2, warmup_steps=0, logging_steps=1, save_strategy="no", use_cpu=True, bf16=False,
        activation_checkpointing=False, report=False,
    )  # fmt: skip
    assert main(["train", "--config", str(recipe), *stand_in]) == 0
    steps = metrics(tmp_path / "run")
    assert [m["step"] for m in steps] == [1, 2]
    assert all(m["grad_norm"] > 0 for m in steps)
    assert steps[0]["dynamic_sampling/rounds"] >= 1
