"""A tiny random Llama with a character tokenizer, and a trainer around it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hapo.trl import HAPOConfig, HAPOTrainer

ALPHABET = "0123456789+= abcdefghij"


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<eos>", *ALPHABET])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def model(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(ALPHABET) + 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    net = LlamaForCausalLM(LlamaConfig(**{**sizes, **config}))
    with torch.no_grad():
        net.lm_head.weight.mul_(12)  # spread the entropies
    return net


def data(n: int = 64) -> Dataset:
    return Dataset.from_dict({"prompt": [f"{i % 10}+{i // 10}=" for i in range(n)], "i": list(range(n))})


def count_digits(completions: list[str], **_: Any) -> list[float]:
    """A reward that a random model earns sometimes."""
    return [float(sum(c.isdigit() for c in text) % 3 == 0) for text in completions]


def half_mixed(completions: list[str], i: list[int], **_: Any) -> list[float]:
    """Odd prompts always earn the same, so that dynamic sampling has to draw further ones."""
    return [1.0 if k % 2 else float(len(c) % 2) for c, k in zip(completions, i, strict=True)]


def config(folder: Path | str, **options: Any) -> HAPOConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "steps_per_generation": 4,
        "max_completion_length": 8,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "activation_checkpointing": False,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    return HAPOConfig(**{**defaults, **options})


def trainer(folder: Path | str, net: Any = None, reward: Any = count_digits, **options: Any) -> HAPOTrainer:
    own = ("method_object", "peft_config", "rollout_func", "demonstrations")
    kwargs = {k: options.pop(k) for k in own if k in options}
    method = kwargs.pop("method_object", None)
    return options.pop("kind", HAPOTrainer)(
        net if net is not None else model(),
        reward,
        config(folder, **options),
        train_dataset=data(),
        processing_class=tokenizer(),
        method=method,
        **kwargs,
    )
