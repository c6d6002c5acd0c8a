"""A model, prompts and a reward for verl, made in a folder."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hapo.assets import tiny_model_path

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **others):
    digits = sum(character.isdigit() for character in solution_str)
    return {"score": float(digits % 3), "acc": float(digits % 3 > 0)}


def by_token(data_source, solution_str, ground_truth, extra_info, **others):
    ids = extra_info["response_ids"]
    scores = [(token % 5) / 4 if place % 2 else 0.0 for place, token in enumerate(ids)]
    return {"score": scores, "acc": float(sum(scores) > 3.5)}
"""


def make_inputs(folder: Path, width: int = 32, layers: int = 2, sharpness: float = 20.0) -> Path:
    """An untied Llama of random weights, whose entropies vary with `sharpness`, prompts, and a reward for digits."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            dtype="float32",
        )
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(0)
    rows = [
        {
            "data_source": "addition",
            "prompt": [{"role": "user", "content": f"{rng.randint(100, 999)}+{rng.randint(10, 999)}="}],
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": index},
        }
        for index in range(256)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:8]), folder / "val.parquet")
    (folder / "reward.py").write_text(REWARD)
    return folder
