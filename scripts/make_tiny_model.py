"""Makes the bundled tiny model: tokenizer, weights and card, in src/hapo/assets/tiny.

    python scripts/make_tiny_model.py [--out FOLDER] [--rounds SHARE ... --steps N]

A character-level Llama is warmed up on worked additions and stopped while it is right about one time in four, so
that reinforcement learning has something to do. Seeded and on one thread: the same machine and library versions
give the same bytes; elsewhere the figures move, which is why the checkpoint ships.

With `--rounds 0.2 0.4 0.4` a fifth of the warm-up answers hold no written columns, two fifths hold them once, two
fifths twice: the start of the comparisons in which lengths vary within a group.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import random
import string
from collections import Counter
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hapo.assets import tiny_model_path
from hapo.tasks.addition import (
    HIGH,
    LOW,
    MAX_COMPLETION,
    addition_reward,
    held_out,
    load_addition,
    prompt,
    solution,
)

SEED = 0
STEPS = 225  # sampled accuracy: step 205 18 %, 215 34 %, 225 29 %, 235 39 %, 260 44 %, 290 55 %, 400 83 %
BATCH = 128
LEARNING_RATE = 1e-3
EVAL_PROBLEMS = 500
GROUP = 8


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: printable ASCII and the newline. Any other character is an error."""
    characters = [c for c in string.printable if c.isprintable()] + ["\n"]
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def answer_of(a: int, b: int, rounds: int) -> str:
    """The worked answer with its columns written `rounds` times."""
    columns, _, total = solution(a, b).rpartition(";")
    return (columns + ";") * rounds + total


def warm_up_batch(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, rounds: list[float]
) -> tuple[Tensor, Tensor]:
    """Token ids and labels, (B, T), of BATCH worked answers; prompts and padding carry no label."""
    rows: list[tuple[list[int], list[int]]] = []
    while len(rows) < BATCH:
        a, b = rng.randint(LOW, HIGH), rng.randint(LOW, HIGH)
        if held_out(a, b):
            continue
        written = rng.choices(range(len(rounds)), rounds)[0] if len(rounds) > 2 else 1
        question, answer = tokenizer(prompt(a, b)).input_ids, tokenizer(answer_of(a, b, written)).input_ids
        rows.append((question, [*answer, tokenizer.eos_token_id]))
    width = max(len(question) + len(answer) for question, answer in rows)
    ids = torch.full((BATCH, width), tokenizer.pad_token_id)
    labels = torch.full((BATCH, width), -100)
    for i, (question, answer) in enumerate(rows):
        end = len(question) + len(answer)
        ids[i, :end] = torch.tensor(question + answer)
        labels[i, len(question) : end] = torch.tensor(answer)
    return ids, labels


def warm_up(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, rounds: list[float]) -> None:
    """Supervised steps: AdamW, linear warm-up of the rate over 50 steps, then constant."""
    rng = random.Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50)
        ids, labels = warm_up_batch(tokenizer, rng, rounds)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, longest: int
) -> tuple[dict[str, float], float]:
    """Percentages on the held-out problems: greedy, and GROUP answers each sampled at temperature 1; and the
    standard deviation of the answer's length within a group, averaged over groups."""
    _, problems = load_addition(SEED, 0, EVAL_PROBLEMS)
    inputs = tokenizer(list(problems["prompt"]), return_tensors="pt")

    def answers(**how: object) -> list[str]:
        out = model.generate(**inputs, max_new_tokens=longest, **how)
        return tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)

    torch.manual_seed(SEED)
    greedy = answers(do_sample=False)
    sampled = answers(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=GROUP)
    gold = list(problems["answer"])
    right_greedy = torch.tensor(addition_reward([], greedy, gold))
    right = torch.tensor(addition_reward([], sampled, [g for g in gold for _ in range(GROUP)])).view(-1, GROUP)
    lengths = torch.tensor([len(s) for s in sampled], dtype=torch.float).view(-1, GROUP)
    mixed = (right.sum(1) > 0) & (right.sum(1) < GROUP)
    figures = {
        "sampled accuracy": 100 * right.mean().item(),
        "greedy accuracy": 100 * right_greedy.mean().item(),
        f"groups of {GROUP} with right and wrong answers": 100 * mixed.float().mean().item(),
        "most frequent gold answer": 100 * max(Counter(gold).values()) / len(gold),
    }
    return figures, lengths.std(1).mean().item()


CARD = """# The bundled tiny model

A character-level Llama of {parameters:,} parameters (float32) that adds three-digit numbers with written carries:
`347+586=` continues `7+6=13;4+8+1=13;3+5+1=9;933`. It is made to be improved by reinforcement learning, and good
for nothing else.

Made by `scripts/make_tiny_model.py` from nothing: {steps} supervised steps of {batch} worked answers, AdamW at
{rate:g}, seed {seed}, one thread, stopped early on purpose. No problem that evaluation uses, in either order,
was in the warm-up; the rule is `held_out` in `hapo.tasks.addition`.

Start, on {problems} held-out problems ({group} answers each where sampled, temperature 1):

| figure | % |
|---|---|
{figures}

Mean spread (standard deviation) of the length within a group: {spread:.2f} tokens.

- torch {torch}, transformers {transformers}, {machine}
- sha256 of model.safetensors: {sha256}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=tiny_model_path())
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=float, nargs="+", default=[0.0, 1.0], metavar="SHARE")
    given = parser.parse_args()
    out: Path = given.out

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    warm_up(model, tokenizer, given.steps, given.rounds)
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    longest = MAX_COMPLETION * (len(given.rounds) - 1)
    figures, spread = measure(model, tokenizer, longest)
    card = CARD.format(
        parameters=model.num_parameters(),
        steps=given.steps,
        batch=BATCH,
        rate=LEARNING_RATE,
        seed=SEED,
        problems=EVAL_PROBLEMS,
        group=GROUP,
        figures="\n".join(f"| {name} | {value:.1f} |" for name, value in figures.items()),
        spread=spread,
        torch=torch.__version__,
        transformers=transformers.__version__,
        machine=platform.machine(),
        sha256=hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
    )
    (out / "CARD.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
