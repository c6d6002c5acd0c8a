"""`hapo doctor` on recipes of `hapo sft`: each finding on demonstrations that are wrong in that one way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoTokenizer

from hapo.assets import tiny_model_path
from hapo.cli.doctor import main
from hapo.cli.plan import examine_recipe, learns_from_demonstrations
from hapo.insight.doctor import DEMONSTRATION_CHECKS, Finding

USUAL = {"model_name_or_path": "tiny", "method": "dft", "max_steps": 4, "max_length": 64, "eval_size": 20}
SOLVED = [{"question": f"{i}+1=", "completion": f"{i};" * (1 + i % 3), "answer": i + 1} for i in range(120)]
UNANSWERED = [{k: row[k] for k in ("question", "completion")} for row in SOLVED]
TEXTS = [{"text": f"{i}+1={i + 1}"} for i in range(120)]
CHATS = [
    {"messages": [{"role": "user", "content": f"{i}+1"}, {"role": "assistant", "content": f"{i + 1}"}]}
    for i in range(120)
]
SHORT = {"model_init_kwargs": {"max_position_embeddings": 12}}
WRAPPED = {"packing": True, "packing_strategy": "wrapped"}
EPOCHS = {"max_steps": -1, "num_train_epochs": 30}
ADAPTER = {"learning_rate": 0.1, "use_peft": True}

BROKEN = [
    ("targets_cut", "warning", SOLVED, {"max_length": 12}, "longer than max_length 12", "--max_length 32"),
    ("targets_cut", "error", SOLVED, {"max_length": 4}, "the prompt alone fills it", "leave the long ones out"),
    ("beyond_context", "warning", SOLVED, SHORT, "the model has 12 positions", "--max_length 12"),
    ("packed_across", "warning", SOLVED, WRAPPED, "cut every 64 tokens", "--packing_strategy bfd"),
    ("prompts_learnt", "note", CHATS, {}, "assistant_only_loss is off", "--assistant_only_loss true"),
    ("many_passes", "warning", SOLVED, {"max_steps": 400}, "each seen 32 times", "--max_steps 37"),
    ("many_passes", "warning", SOLVED, EPOCHS, "100 demonstrations, each seen 30 times", "--max_steps 37"),
    ("not_measured", "warning", SOLVED, {"eval_size": 9}, "9 demonstrations held out", "--eval_size 200"),
    ("not_measured", "warning", SOLVED, {"evaluate": False}, "evaluate is off", "--evaluate true"),
    ("no_accuracy", "note", TEXTS, {}, "texts without a question", "--answer_column"),
    ("no_accuracy", "note", UNANSWERED, {}, "have no column 'answer'", "--answer_column"),
    ("answers_cut", "warning", SOLVED, {"max_completion_length": 8}, "length 8", "--max_completion_length 16"),
    ("supervised_rate", "warning", SOLVED, {"learning_rate": 1e-8}, "1e-08 with full", "--learning_rate 2e-05"),
    ("supervised_rate", "warning", SOLVED, ADAPTER, "0.1 with an adapter", "--learning_rate 0.0002"),
]


def examine(folder: Path, rows: list[dict[str, Any]], **options: Any) -> list[Finding]:
    """A healthy recipe with these demonstrations and options."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {**USUAL, "dataset": str(folder / "rows.jsonl"), **options}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return examine_recipe(["--config", str(folder / "recipe.yaml")])


@pytest.mark.parametrize(("name", "severity", "rows", "options", "saw", "change"), BROKEN)
def test_what_is_wrong_with_demonstrations(name, severity, rows, options, saw, change, tmp_path):
    if rows is CHATS:
        options = {"model_name_or_path": str(chatting(tmp_path / "model"))}
    found = [one for one in examine(tmp_path, rows, **options) if name == one.name or one.severity != "note"]
    assert [(one.name, one.severity) for one in found] == [(name, severity)]
    assert saw in found[0].saw and change in found[0].change


def chatting(folder: Path) -> Path:
    """The bundled model with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    tokenizer.save_pretrained(folder)
    AutoConfig.from_pretrained(tiny_model_path()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"use_peft": True, "learning_rate": 2e-4}])
def test_healthy_demonstrations(options, tmp_path):
    assert examine(tmp_path, SOLVED, **options) == []


def test_every_finding_has_a_broken_case_here():
    assert {check.__name__ for check in DEMONSTRATION_CHECKS} == {name for name, *_ in BROKEN}


def test_the_embedded_recipe_is_healthy(capsys):
    assert main(["sft", "--train_size", "256", "--max_steps", "16"]) == 0
    assert capsys.readouterr().out == "nothing found\n"


@pytest.mark.parametrize(
    ("text", "sft"),
    [("packing: true", True), ("method: ranktuner", True), ("method: dapo", False), ("seed: 1", False)],
)
def test_a_recipe_is_of_sft_by_its_method_or_by_an_option_of_its_own(text, sft, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    assert learns_from_demonstrations(["--config", str(tmp_path / "recipe.yaml")]) == sft
    assert learns_from_demonstrations(["--model", "tiny", "--max_length", "9"])


def test_columns_that_are_not_there_are_named_as_training_does(tmp_path):
    with pytest.raises(ValueError, match="no demonstrations: it has none of the columns.*Set messages_column"):
        examine(tmp_path, [{"a": 1}] * 40)
