#!/usr/bin/env bash
# accelerate 1.15.0, transformers 5.24.0: after Accelerator(mixed_precision="bf16").prepare(model), generate() of the
# float32 model runs each forward pass in an autocast block of its own, and rounds every weight to bfloat16 again for every
# token. accelerator.autocast() around generate() rounds them once; the tokens are the same. Seen, 16 tokens: 16 and 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "accelerate==1.15.0" "transformers==5.24.0" "torch==2.13.0" 2>&1 | { grep -v WARNING || true; }
OMP_NUM_THREADS=1 "$folder/env/bin/python" -W ignore - <<'PY'
from contextlib import nullcontext
from importlib.metadata import version

import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS = 16


class Roundings(TorchDispatchMode):
    def __init__(self, weight):
        super().__init__()
        self.place, self.count = weight.data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() == self.place:
            self.count += 1
        return func(*args, **(kwargs or {}))


torch.manual_seed(0)
shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=80)
accelerator = Accelerator(mixed_precision="bf16", cpu=True)
model = accelerator.prepare(LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2)))
net = accelerator.unwrap_model(model).eval()
ids = torch.randint(3, 80, (2, 5))
counts, tokens = [], []
for context in (nullcontext(), accelerator.autocast()):
    with context, Roundings(net.model.layers[0].mlp.up_proj.weight) as seen:
        tokens.append(net.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False))
    counts.append(seen.count)
print("accelerate", version("accelerate"), "transformers", version("transformers"))
print("times that a weight was rounded:", counts, "same tokens:", torch.equal(*tokens))
assert counts == [TOKENS, 1] and torch.equal(*tokens), "generation rounds the weights another number of times now"
PY
