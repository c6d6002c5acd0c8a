"""Makes the bundled tiny masked-diffusion model: tokenizer, weights and card, in src/hapo/assets/diffusion_tiny.

    python scripts/make_diffusion_model.py [--out FOLDER] [--steps N]

A character-level BERT is warmed up on worked additions of which some characters are hidden, and stopped while it
is right about one time in four, so that reinforcement learning has something to do. Seeded and on one thread: the
same machine and library versions give the same bytes; elsewhere the figures move, which is why the weights ship.
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
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from hapo.assets import diffusion_model_path, tiny_model_path
from hapo.masked import masked_scores
from hapo.parts.elbo import contributions, draw_masks, mask_views
from hapo.samplers.diffusion import Unmasking, decode
from hapo.tasks.addition import HIGH, LOW, addition_reward, held_out, load_addition, prompt

SEED = 0
STEPS = 300
BATCH = 128
LEARNING_RATE = 1e-3
LENGTH = 14
"""Positions of a response: three columns, up to four digits of the sum, and the end of the sequence."""
EVAL_PROBLEMS = 500
GROUP = 8


def make_tokenizer() -> PreTrainedTokenizerFast:
    """That of the other bundled model, a token a character, and a mask token."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
        dtype="float32",
    )
    return BertForMaskedLM(config)


def answer_of(a: int, b: int) -> str:
    """The sums of the columns from the right, each with two digits, then the sum: 347 + 586 is 13;13;09;933."""
    columns, carry = [], 0
    for p, q in zip(reversed(str(a)), reversed(str(b)), strict=True):
        columns.append(f"{int(p) + int(q) + carry:02d};")
        carry = int(p) + int(q) + carry > 9
    return "".join(columns) + str(a + b)


def problems(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Ids of BATCH prompts (B, P), all of one length, and of their answers (B, L), ends of sequence behind."""
    questions, answers = [], []
    while len(questions) < BATCH:
        a, b = rng.randint(LOW, HIGH), rng.randint(LOW, HIGH)
        if not held_out(a, b):
            digits = tokenizer(answer_of(a, b)).input_ids
            questions.append(tokenizer(prompt(a, b)).input_ids)
            answers.append(digits + [tokenizer.eos_token_id] * (LENGTH - len(digits)))
    return torch.tensor(questions), torch.tensor(answers)


def warm_up(model: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """Steps on the ELBO, one mask an answer: AdamW, linear warm-up of the rate over 50 steps, then constant."""
    rng, masks = random.Random(SEED), torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50)
        questions, answers = problems(tokenizer, rng)
        hidden, weight = mask_views(draw_masks(BATCH, LENGTH, 1, masks), coupled=False)
        wanted = torch.cat([torch.zeros_like(questions).bool(), hidden[:, 0]], 1)
        ids = torch.cat([questions, answers], 1)
        shown = ids.masked_fill(wanted, tokenizer.mask_token_id)
        logp, _ = masked_scores(model, model, shown, torch.ones_like(ids), ids, wanted, shifted=False)
        loss = -contributions(logp[:, None, -LENGTH:], weight).sum(1).mean() / LENGTH
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def measure(model: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Percentages on the held-out problems: greedy, and GROUP answers each drawn at temperature 1."""
    _, held = load_addition(SEED, 0, EVAL_PROBLEMS)
    gold = list(held["answer"])
    questions = tokenizer(list(held["prompt"]), return_tensors="pt").input_ids

    def right(copies: int, temperature: float) -> Tensor:
        ids = questions.repeat_interleave(copies, 0)
        drawn = decode(
            model,
            ids,
            torch.ones_like(ids),
            Unmasking(length=LENGTH, temperature=temperature),
            mask_id=tokenizer.mask_token_id,
            eos_ids=[tokenizer.eos_token_id],
            generator=torch.Generator().manual_seed(SEED),
        ).ids.tolist()
        texts = [text.partition(tokenizer.eos_token)[0] for text in tokenizer.batch_decode(drawn)]
        return torch.tensor(addition_reward([], texts, [g for g in gold for _ in range(copies)])).view(-1, copies)

    sampled = right(GROUP, 1.0)
    mixed = (sampled.sum(1) > 0) & (sampled.sum(1) < GROUP)
    return {
        "sampled accuracy": 100 * sampled.mean().item(),
        "greedy accuracy": 100 * right(1, 0.0).mean().item(),
        f"groups of {GROUP} with right and wrong answers": 100 * mixed.float().mean().item(),
    }


CARD = """# The bundled tiny masked-diffusion model

A character-level BERT of {parameters:,} parameters (float32) that adds three-digit numbers by their columns, from
the right: `347+586=` is answered by `13;13;09;933` and ends of sequence, {length} positions in all, unmasked in
any order. It is made to be improved by reinforcement learning, and good for nothing else.

Made by `scripts/make_diffusion_model.py` from nothing: {steps} steps of {batch} answers on the ELBO, a mask each,
AdamW at {rate:g}, seed {seed}, one thread, stopped early on purpose. No problem that evaluation uses, in either
order, was in the warm-up; the rule is `held_out` in `hapo.tasks.addition`.

Start, on {problems} held-out problems ({group} answers each where sampled, temperature 1), one position a forward
pass:

| figure | % |
|---|---|
{figures}

- torch {torch}, transformers {transformers}, {machine}
- sha256 of model.safetensors: {sha256}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=diffusion_model_path())
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    out: Path = given.out

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    warm_up(model, tokenizer, given.steps)
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    card = CARD.format(
        parameters=model.num_parameters(),
        length=LENGTH,
        steps=given.steps,
        batch=BATCH,
        rate=LEARNING_RATE,
        seed=SEED,
        problems=EVAL_PROBLEMS,
        group=GROUP,
        figures="\n".join(f"| {name} | {value:.1f} |" for name, value in measure(model, tokenizer).items()),
        torch=torch.__version__,
        transformers=transformers.__version__,
        machine=platform.machine(),
        sha256=hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
    )
    (out / "CARD.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
