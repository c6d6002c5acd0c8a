#!/usr/bin/env bash
# transformers 5.24.0: generate(streamer=..., custom_generate=function) takes both without a word, and the streamer is not
# among the arguments of the function, though it has a parameter of that name, as GenerationMixin._sample has. So the
# streamer gets the prompt, no token, and no end. Without custom_generate it gets all. Seen, 4 new tokens: 1 put and 0
# ends with a function that hands all it gets to _sample, 5 puts and 1 end without.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "transformers==5.24.0" "torch==2.13.0" 2>&1 | { grep -v WARNING || true; }
OMP_NUM_THREADS=1 "$folder/env/bin/python" -W ignore - <<'PY'
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

TOKENS = 4


class Counting(BaseStreamer):
    puts = ends = 0

    def put(self, value):
        self.puts += 1

    def end(self):
        self.ends += 1


def loop(model, input_ids, streamer=None, **rest):
    return type(model)._sample(model, input_ids, streamer=streamer, **rest)


torch.manual_seed(0)
shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2)).eval()
ids = torch.tensor([[5, 9, 3]])
seen, tokens = [], []
for options in ({"custom_generate": loop}, {}):
    streamer = Counting()
    tokens.append(
        model.generate(ids, streamer=streamer, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, **options)
    )
    seen.append((streamer.puts, streamer.ends))
print("transformers", version("transformers"))
print("puts and ends of the streamer with a function as custom_generate, and without:", seen)
print("same tokens:", torch.equal(*tokens))
assert seen == [(1, 0), (1 + TOKENS, 1)] and torch.equal(*tokens), "a streamer reaches custom_generate otherwise now"
PY
