"""Makes models/SmolLM2-135M-warm: SmolLM2-135M-Instruct, taught the answer format of the arithmetic task.

    python scripts/warm_up_smollm2.py [--model FOLDER] [--out FOLDER]

The instruct model answers sums in prose and is right about one time in ten. A short supervised training on worked
sums, stopped early on purpose, leaves it right often enough that groups of answers differ, which is what
reinforcement learning needs.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from pathlib import Path

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from hapo.tasks import Task, TaskConfig, load_task

MODEL = Path("models/SmolLM2-135M-Instruct")
OUT = Path("models/SmolLM2-135M-warm")

SEED = 0
WARM_UP_TASK_SEED = 1
"""Not the seed of the recipe: the sums of the warm-up and of the reinforcement learning are drawn apart."""

STEPS = 12
BATCH = 16
LEARNING_RATE = 2e-5
GROUP = 8
MAX_TOKENS = 32
EVAL_PROBLEMS = 500
"""Held out; at least as many as the recipe holds out."""
MEASURED = 64
WINDOW = 20, 60
"""Percentage of right answers outside of which the model is no good start."""

SYSTEM_PROMPT = "Calculate step by step."
TASK_OPTIONS = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}


def warm_up_task() -> Task:
    """The task of recipes/smollm2_arithmetic.yaml with other training problems, the same ones held out."""
    return load_task(
        TaskConfig(
            dataset="reasoning_gym:chain_sum",
            task_options=TASK_OPTIONS,
            chat=True,
            system_prompt=SYSTEM_PROMPT,
            train_size=STEPS * BATCH,
            eval_size=EVAL_PROBLEMS,
            task_seed=WARM_UP_TASK_SEED,
        ),
        seed=SEED,
    )


def worked(question: str) -> str:
    """The partial sums, one a line, and the answer.

    >>> worked("... problem: 15 - 43 - 75 =")
    '15 - 43 = -28\\n-28 - 75 = -103\\nAnswer: -103'
    """
    first, *rest = re.findall(r"[-+]? ?\d+", question.rpartition(":")[2])
    total, lines = int(first), []
    for term in rest:
        sign, size = term[0], int(term[1:])
        lines.append(f"{total} {sign} {size} = {(total := total + size if sign == '+' else total - size)}")
    return "\n".join([*lines, f"Answer: {total}"])


def examples(task: Task) -> Dataset:
    return task.train.map(
        lambda row: {"completion": [{"role": "assistant", "content": worked(row["question"])}]},
        remove_columns=[name for name in task.train.column_names if name != "prompt"],
    )


@torch.no_grad()
def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> dict[str, float]:
    """Percentages on MEASURED held-out problems, GROUP answers each, sampled at temperature 1."""
    model.eval()
    tokenizer.padding_side = "left"
    rows = task.eval.select(range(MEASURED))
    columns = {name: [value for value in rows[name] for _ in range(GROUP)] for name in rows.column_names}
    inputs = tokenizer.apply_chat_template(
        list(rows["prompt"]),
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
        padding=True,
    )
    torch.manual_seed(SEED)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    out = model.generate(**inputs, max_new_tokens=MAX_TOKENS, num_return_sequences=GROUP, **sampling)
    answers = out[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    prompts = columns.pop("prompt")
    right = torch.tensor(task.reward_funcs[0](prompts, texts, **columns)).view(-1, GROUP)
    mixed = (right.sum(1) > 0) & (right.sum(1) < GROUP)
    return {
        "right, %": 100 * right.mean().item(),
        f"groups of {GROUP} with right and wrong answers, %": 100 * mixed.float().mean().item(),
        "tokens an answer": (answers != tokenizer.pad_token_id).sum(1).float().mean().item(),
    }


CARD = """# SmolLM2-135M-warm

SmolLM2-135M-Instruct (Apache-2.0; from the 4-bit weights, see its own folder) after {steps} supervised steps of
{batch} worked sums each, AdamW at {rate:g}, seed {seed}, bfloat16 autocast on float32 weights. It answers

    {question}
with
{example}

and is no good for anything else. Made by `scripts/warm_up_smollm2.py`, torch {torch},
threads: {threads}, TRL {trl}.

On {problems} problems that neither this training nor the recipe trains on, {group} answers each at temperature 1:

| figure | |
|---|---|
{figures}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help=f"default: {MODEL}")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default: {OUT}")
    given = parser.parse_args()
    out: Path = given.out

    task = warm_up_task()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    args = SFTConfig(
        str(out),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        seed=SEED,
    )
    SFTTrainer(model, args, train_dataset=examples(task), processing_class=tokenizer).train()

    figures = measure(model, tokenizer, task)
    low, high = WINDOW
    if not low <= figures["right, %"] <= high:
        raise SystemExit(
            f"{figures['right, %']:.0f} % right after {STEPS} steps, not {low} to {high} %: change STEPS"
        )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    question = task.eval[0]["question"]
    card = CARD.format(
        steps=STEPS,
        batch=BATCH,
        rate=LEARNING_RATE,
        seed=SEED,
        question=question,
        example=textwrap.indent(worked(question), " " * 4),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        trl=trl.__version__,
        problems=MEASURED,
        group=GROUP,
        figures="\n".join(f"| {name} | {value:.1f} |" for name, value in figures.items()),
    )
    (out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
