"""Share that the adaptive temperature adds to a decode step of a real vLLM engine on CPU: paired and alternating.

    VLLM_CPU_KVCACHE_SPACE=1 python -m bench.vllm_step --vocabulary 49152 --output bench/results/vllm_49152.json

A Llama of random weights, in the shape of a published model, is served in this process. A pair generates the
same number of tokens from the same prompts without a rule and with one, in turns first and second. Reported, as
median and quartiles over the pairs: the processor seconds added, in percent, and those spent inside `temper_`,
which are far less noisy. `--same` gives neither side a rule: the noise of the former.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # processor seconds are of this process
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import vllm
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

import hapo.samplers.vllm as plugin
from hapo.batch import EntropyStats
from hapo.methods._options import TemperatureOptions
from hapo.samplers.rule import TemperatureRule

from .paired import machine, seconds, summary

RULE = TemperatureRule(TemperatureOptions(tau=0.1), EntropyStats(pivot=0.3, sigma=1.0, h_max=2.0, h_min=-8.0))


# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads
SHAPES = {
    "smollm2-135m": (576, 1536, 30, 9, 3),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2),
}


def model(folder: str, vocabulary: int, shape: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    hidden, intermediate, layers, heads, key_value_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    net = LlamaForCausalLM(config)
    net.save_pretrained(folder)
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--same", action="store_true", help="no rule on either side")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        model(folder, given.vocabulary, given.shape)
        llm = LLM(
            folder,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=given.tokens + 32,
            max_num_seqs=given.prompts,
            enable_prefix_caching=False,
            logits_processors=["hapo.samplers.vllm:TemperatureOptions"],
            disable_log_stats=True,
            seed=0,
        )
    # Prompts of one token, so that every step is a decode step.
    prompts = [{"prompt_token_ids": [token]} for token in range(2, 2 + given.prompts)]

    def generate(args: dict[str, float | str]) -> None:
        asked = SamplingParams(
            temperature=1.0, max_tokens=given.tokens, ignore_eos=True, detokenize=False, extra_args=args
        )
        done = llm.generate(prompts, asked, use_tqdm=False)
        assert all(len(request.outputs[0].token_ids) == given.tokens for request in done)

    inside = 0.0
    temper_ = plugin.temper_

    def timed(*args: Any) -> None:
        nonlocal inside
        inside += seconds(lambda: temper_(*args))[0]

    plugin.temper_ = timed
    rule = {} if given.same else RULE.to_args()
    begin = {**machine(), "vllm": vllm.__version__}
    added, within, without = [], [], []
    for pair in range(-1, given.pairs):  # the first warms up
        inside = 0.0
        sides = [("with", rule), ("without", {})]
        took = {name: seconds(lambda args=args: generate(args)) for name, args in sides[:: 1 if pair % 2 else -1]}
        print(f"pair {pair}: {took}", file=sys.stderr)
        if pair >= 0:
            added.append(took["with"][0] / took["without"][0] - 1)
            within.append(inside / took["without"][0])
            without.append(1e3 * took["without"][0] / given.tokens)
    report = {
        "machine": {**begin, "load_after": machine()["load"]},
        "settings": {k: v for k, v in vars(given).items() if k != "output"},
        "step_ms": summary(without),
        "added_percent": summary([100 * a for a in added]),
        "temper_percent": summary([100 * w for w in within]),
        "pairs": [round(100 * a, 2) for a in added],
    }
    print(json.dumps(report, indent=1))
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
