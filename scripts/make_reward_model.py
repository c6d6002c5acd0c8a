"""Makes the bundled reward model: tokenizer, weights and card, in src/hapo/assets/reward_tiny.

    python scripts/make_reward_model.py [--out FOLDER] [--steps N]

A character-level Llama with a head of one number learns `parts_right`: the share of an answer's columns, with its
sum, that are right. Half of the rows have characters of the answer masked, at any rate, and keep the score of the
whole answer. So the score of a masked answer is what can be expected of it, and a masked wrong digit raises it: a
good attribution blames that digit. A second head, thrown away at the end, says at each character whether its part
is right so far and what should follow, without which the few parameters take hours to see the columns.

Seeded and on one thread: the same machine and library versions give the same bytes; elsewhere the figures move,
which is why the weights ship.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import random
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from hapo.assets import reward_model_path, tiny_model_path
from hapo.tasks.addition import (
    MAX_COMPLETION,
    draw_problems,
    parts_right,
    prompt,
    solution,
)

SEED = 0
STEPS = 4000
BATCH = 128
LEARNING_RATE = 2e-3
SAMPLED_PROBLEMS = 4000
EVAL_PROBLEMS = 500
DIGITS = "0123456789"

Answer = tuple[int, int, str]
"""Summands and completion, without its end of sequence."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the tiny model, with a mask token behind its ids."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path(), local_files_only=True)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForSequenceClassification:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
        problem_type="regression",
        dtype="float32",
    )
    return LlamaForSequenceClassification(config)


def sampled_answers(rng: random.Random, evaluation: bool, size: int) -> list[Answer]:
    """One answer of the tiny model to each of `size` problems, drawn at temperature 1."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path(), local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path(), local_files_only=True).eval()
    problems = draw_problems(rng, size, evaluation=evaluation)
    inputs = tokenizer([prompt(a, b) for a, b in problems], return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=MAX_COMPLETION, do_sample=True, top_k=0, top_p=1.0)
    texts = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [(a, b, text) for (a, b), text in zip(problems, texts, strict=True)]


def spoilt(rng: random.Random, text: str) -> str:
    """An answer with one to four errors: mostly a digit in the place of another, at times one more or one less."""
    characters = list(text)
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        place = rng.randrange(len(characters))
        kind = rng.random()
        if kind < 0.8:
            digits = [i for i, c in enumerate(characters) if c in DIGITS]
            place = rng.choice(digits)
            characters[place] = rng.choice([d for d in DIGITS if d != characters[place]])
        elif kind < 0.9 and len(characters) > 8:
            del characters[place]
        else:
            characters.insert(place, rng.choice(DIGITS + "+=;"))
    return "".join(characters)


def nonsense(rng: random.Random, text: str) -> str:
    """Answers of no right form: parts in another order, twice, missing; characters at random; nothing."""
    parts = text.split(";")
    kind = rng.randrange(5)
    if kind == 0:
        rng.shuffle(parts)
    elif kind == 1:
        parts = parts[: rng.randrange(1, 4)] + parts[rng.randrange(4) :]
    elif kind == 2:
        parts = [parts[-1]] if rng.random() < 0.5 else parts[rng.randrange(1, 4) :]
    elif kind == 3:
        return "".join(rng.choice(DIGITS + "+=;;=") for _ in range(rng.randrange(MAX_COMPLETION)))
    else:
        return text[: rng.randrange(len(text))]
    return ";".join(parts)[: MAX_COMPLETION - 1]


def draw(rng: random.Random, sampled: list[Answer], problems: list[tuple[int, int]]) -> Answer:
    """A quarter each of right answers, of the tiny model's, and near half of spoilt ones; the rest is nonsense."""
    kind = rng.random()
    if kind < 0.25:
        return rng.choice(sampled)
    a, b = rng.choice(problems)
    if rng.random() < 0.5:
        a, b = b, a
    text = solution(a, b)
    if kind < 0.45:
        return a, b, text
    return a, b, (spoilt(rng, text) if kind < 0.9 else nonsense(rng, text))[: MAX_COMPLETION - 1]


def guides(a: int, b: int, completion: str, end: str) -> tuple[list[int], list[str]]:
    """For each character and the end: is its part right, as far as it is written (at its end: is it all there?);
    and which character is right behind it, "" where none is or after an error."""
    right = solution(a, b).split(";")
    found, after, number, part = [], [], 0, ""
    for character in [*completion, end]:
        gold = right[number] if number < len(right) else None
        closes = ";" if number < len(right) - 1 else end
        rest: list[str] = []
        if character in (";", end):
            found.append(int(part == gold and character == closes))
            number, part = number + 1, ""
            rest = list(right[number]) if number < len(right) else []
        else:
            part += character
            found.append(int(gold is not None and gold.startswith(part)))
            rest = [*(gold or ""), closes][len(part) :]
        after.append(rest[0] if found[-1] and rest else "")
    return found, after


def batch_of(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, answers: list[Answer], masked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Token ids, (B, T), the place of the end, (B,), scores, (B,), and `guides`, (B, T) each, -1 where is none."""
    rows = []
    for a, b, text in answers:
        question, answer = tokenizer(prompt(a, b)).input_ids, tokenizer(text).input_ids
        rate = rng.random() if masked and rng.random() < 0.5 else 0.0
        hidden = [tokenizer.mask_token_id if rng.random() < rate else token for token in answer]
        found, after = guides(a, b, text, tokenizer.eos_token)
        following = [tokenizer.convert_tokens_to_ids(c) if c else -1 for c in after]
        rows.append((question, [*hidden, tokenizer.eos_token_id], found, following, parts_right(a, b, text)))
    width = max(len(question) + len(answer) for question, answer, *_ in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((2, len(rows), width), -1)
    end = torch.tensor([len(question) + len(answer) - 1 for question, answer, *_ in rows])
    for i, (question, answer, found, following, _) in enumerate(rows):
        ids[i, : end[i] + 1] = torch.tensor(question + answer)
        labels[0, i, len(question) : end[i] + 1] = torch.tensor(found)
        labels[1, i, len(question) : end[i] + 1] = torch.tensor(following)
    return ids, end, torch.tensor([score for *_, score in rows]), labels[0], labels[1]


def train(model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """AdamW, the rate warmed up over 100 steps, then cosine to 0; squared error of the score and the
    cross-entropies of the two guides, means over the batch, without accumulation."""
    rng = random.Random(SEED)
    sampled = sampled_answers(rng, False, SAMPLED_PROBLEMS)
    problems = draw_problems(rng, 100_000, evaluation=False)
    second = torch.nn.Linear(model.config.hidden_size, 1 + len(tokenizer))
    parameters = [*model.parameters(), *second.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 100, steps)
    functional = torch.nn.functional
    for step in range(steps):
        answers = [draw(rng, sampled, problems) for _ in range(BATCH)]
        ids, end, target, found, following = batch_of(rng, tokenizer, answers, masked=True)
        hidden = model.model(input_ids=ids).last_hidden_state  # causal: what pads on the right is not seen
        score = model.score(hidden[torch.arange(len(ids)), end]).squeeze(-1)
        error = functional.mse_loss(score, target)
        said = second(hidden)
        right = functional.binary_cross_entropy_with_logits(said[..., 0][found >= 0], found[found >= 0].float())
        after = functional.cross_entropy(said[..., 1:][following >= 0], following[following >= 0])
        optimizer.zero_grad()
        (error + 0.3 * right + 0.3 * after).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            told = f"error {error.item() ** 0.5:.4f}, guides {right.item():.4f} {after.item():.4f}"
            print(f"step {step + 1}: {told}", flush=True)


@torch.no_grad()
def measure(model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Errors on held-out problems: right answers, those with one wrong digit, the tiny model's own."""
    rng = random.Random(SEED + 1)
    torch.manual_seed(SEED + 1)
    problems = draw_problems(rng, EVAL_PROBLEMS, evaluation=True)
    one_wrong = []
    for a, b in problems:
        text = solution(a, b)
        place = rng.choice([i for i, c in enumerate(text) if c in DIGITS])
        digit = rng.choice([d for d in DIGITS if d != text[place]])
        one_wrong.append((a, b, text[:place] + digit + text[place + 1 :]))
    sets = {
        "right answers": [(a, b, solution(a, b)) for a, b in problems],
        "one wrong digit": one_wrong,
        "sampled from the tiny model": sampled_answers(rng, True, EVAL_PROBLEMS),
    }
    figures = {}
    for name, answers in sets.items():
        ids, end, target, *_ = batch_of(rng, tokenizer, answers, masked=False)
        hidden = model.model(input_ids=ids).last_hidden_state
        score = model.score(hidden[torch.arange(len(ids)), end]).squeeze(-1)
        figures[f"{name}: root mean square error"] = (score - target).square().mean().sqrt().item()
        figures[f"{name}: share within 0.125"] = ((score - target).abs() < 0.125).float().mean().item()
    return figures


CARD = """---
license: apache-2.0
---

# The embedded reward model

A character-level Llama of {parameters:,} parameters (float32) that scores answers of the addition task: the share
of the written columns and of the sum that are right, `parts_right` in `hapo.tasks.addition`. It is there to be
explained: `<mask>` in the place of a character of the answer asks for the score to be expected without it.

Made by `scripts/make_reward_model.py` from nothing: {steps} steps of {batch} answers, AdamW at {rate:g}, seed
{seed}, one thread. A quarter of the answers were drawn from the bundled tiny model, a fifth were right, the others
spoilt by hand; half had characters masked. No problem that evaluation uses was among them (`held_out`). The model
gives a number for anything; outside additions of three digits it means nothing. Licence: that of hapo.

On {problems} held-out problems:

| figure | |
|---|---|
{figures}

- torch {torch}, transformers {transformers}, {machine}
- sha256 of model.safetensors: {sha256}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=reward_model_path())
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    out: Path = given.out

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    train(model, tokenizer, given.steps)
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    figures = measure(model, tokenizer)
    card = CARD.format(
        parameters=model.num_parameters(),
        steps=given.steps,
        batch=BATCH,
        rate=LEARNING_RATE,
        seed=SEED,
        problems=EVAL_PROBLEMS,
        figures="\n".join(f"| {name} | {value:.3f} |" for name, value in figures.items()),
        torch=torch.__version__,
        transformers=transformers.__version__,
        machine=platform.machine(),
        sha256=hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
    )
    (out / "CARD.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
