"""The recipes of LLaDA and Dream, with tiny random models of the same interface, whose code lies beside the weights."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hapo.cli import main
from hapo.engines.trl.masked_models import load
from hapo.masked import masked_scores, predicts_next
from hapo.tasks import TaskConfig
from hapo.trl import DiffusionConfig
from tests.cli.small import REWARD, flags, metrics
from tests.cli.test_recipe import parse

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("espo_*.yaml"))
WORDS = ["<pad>", "<eos>", "<mask>", "?", *"0123456789", "What", "is", "Please", "answer", "step"]
CLASSES = {"llada": ("LLaDAConfig", "LLaDAModelLM"), "dream": ("DreamConfig", "DreamModel")}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """transformers copies the code of a model into its cache, and imports it from there."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


def stand_in(kind: str, folder: Path) -> Path:
    """A model folder as on the Hub: weights, configuration that names code, code, tokenizer."""
    config_name, model_name = CLASSES[kind]
    code = importlib.import_module(f"tests.cli.stand_ins.{kind}")
    named = {"AutoConfig": f"{kind}.{config_name}", "AutoModel": f"{kind}.{model_name}"}
    if kind == "llada":
        named["AutoModelForCausalLM"] = named["AutoModel"]
    config = getattr(code, config_name)(
        vocab_size=len(WORDS), mask_token_id=2, eos_token_id=1, pad_token_id=0, auto_map=named
    )
    torch.manual_seed(0)
    getattr(code, model_name)(config).save_pretrained(folder)
    shutil.copy(ROOT / "tests" / "cli" / "stand_ins" / f"{kind}.py", folder)
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="?",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}answer",
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_have_the_settings_of_the_paper(recipe):
    _, model, _, task = recipe.stem.split("_")
    problems, args, kind, _, _ = parse("--config", str(recipe))
    assert isinstance(args, DiffusionConfig) and isinstance(problems, TaskConfig)
    assert kind.model_name_or_path.split("/")[1].lower().startswith(model)
    assert args.per_device_train_batch_size * 8 * args.gradient_accumulation_steps == 96
    assert (args.num_iterations, args.updates_per_rollout) == (8, 8)
    assert args.method_options["draws"] == 2 and args.method_options["coupled"]
    assert (args.num_generations, args.max_completion_length, args.block_length) == (6, 256, 32)
    expected = {"gsm8k": (1e-3, 0.2, 256), "countdown": (3e-3, 0.0, 128), "sudoku": (1e-2, 0.2, 128)}[task]
    assert (args.beta, args.method_options["eps_high"], args.diffusion_steps) == expected
    assert (kind.lora_r, kind.lora_alpha, args.learning_rate) == (128, 64, 3e-6)


@pytest.mark.parametrize("task", ["countdown", "sudoku"])
def test_reasoning_gym_takes_the_options_of_the_problems(task):
    from reasoning_gym.factory import create_dataset

    problems, *_ = parse("--config", str(ROOT / "recipes" / f"espo_llada_8b_{task}.yaml"))
    made = create_dataset(problems.dataset.split(":")[1], size=2, seed=0, **(problems.task_options or {}))
    assert len(made[0].get("metadata", {}).get("numbers", [0, 0, 0])) == 3


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_padded_views_score_as_plain_rows_do(kind, tmp_path):
    args = DiffusionConfig(str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False)
    args.trust_remote_code = True
    net, tokenizer = load(str(stand_in(kind, tmp_path / kind)), args)
    net.eval()
    assert tokenizer.padding_side == "left" and predicts_next(net.config) == (kind == "dream")
    ids = torch.randint(4, len(WORDS), (2, 9), generator=torch.Generator().manual_seed(1))
    attention = torch.ones_like(ids)
    attention[1, :3] = 0
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    wanted[:, 5:8] = True
    shown = ids.masked_fill(wanted, 2)
    logp, _ = masked_scores(net, net, shown, attention, ids, wanted, shifted=kind == "dream")
    for row, first in enumerate((0, 3)):
        alone = {"input_ids": shown[row : row + 1, first:]}
        if kind == "dream":
            alone["position_ids"] = torch.arange(9 - first)[None]
        at = net(**alone).logits[0].log_softmax(-1)
        places = torch.arange(5, 8) - first - int(kind == "dream")
        torch.testing.assert_close(logp[row, 5:8], at[places].gather(1, ids[row, 5:8, None])[:, 0])


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_a_recipe_trains_an_adapter_of_a_model_with_the_same_interface(kind, tmp_path):
    rows = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(12)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = tmp_path / "reward.py"
    reward.write_text(
        REWARD.replace("for text in completions", "for text in [c[-1]['content'] for c in completions]")
    )
    recipe = next(path for path in RECIPES if kind in path.stem and "gsm8k" in path.stem)
    options = flags(
        model=stand_in(kind, tmp_path / kind), dataset=tmp_path / "problems.jsonl", dataset_config="none",
        test_split="none", eval_size=3, rewards=f"{reward}:parity", output_dir=tmp_path / "run",
        max_completion_length=8, block_length=4, diffusion_steps=4, num_iterations=2, per_device_train_batch_size=6,
        gradient_accumulation_steps=2, steps_per_generation=2, max_steps=4, warmup_steps=0, learning_rate=0.01,
        logging_steps=1, save_strategy="no", use_cpu=True, bf16=False, activation_checkpointing=False, dtype="float32",
        report=False,
    )  # fmt: skip
    assert main(["train", "--config", str(recipe), *options]) == 0
    steps = metrics(tmp_path / "run")
    assert [m["step"] for m in steps] == [1, 2, 3, 4] and all(m["grad_norm"] > 0 for m in steps)
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-9) and steps[1]["kl"] > 0
    adapter = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    trained = {name.split(".")[-3] for name in adapter}
    wanted = {"llada": {"up_proj"}, "dream": {"o_proj", "up_proj", "down_proj", "gate_proj"}}[kind]
    assert trained == {"q_proj", "k_proj", "v_proj", *wanted}
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
