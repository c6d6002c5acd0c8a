"""SENT's curriculum, ascending, shuffled and descending, and its two levels of KL, on a mixture of tasks.

    python -m bench.sent_study --output bench/results/sent_study.csv

Makes problems of four reasoning-gym tasks and, by a short `hapo sft`, a tiny model that is right about some of
them more often than about others; sorts the training problems with `hapo curriculum`; and compares with `hapo
compare` on bench/compare/sent.yaml, with paired seeds and a learning rate of its own for each arm. The strong
level falls on one token of an optimiser step here, so that an arm gives it to a tenth of the certain tokens too.
Another has the rate of the other arms where tuning chose a smaller one. Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import reasoning_gym
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hapo.cli import main as run
from scripts.make_tiny_model import make_model

from .verdicts import print_verdicts

RECIPE = Path(__file__).parent / "compare" / "sent.yaml"
TASKS: dict[str, dict[str, int]] = {
    "letter_counting": {"min_words": 2, "max_words": 3},
    "gcd": {"max_value": 50},
    "spell_backward": {"min_word_len": 3, "max_word_len": 5},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
}
PHRASES = (
    'How many times does the letter "', '" appear in the text: "',
    "Find the Greatest Common Divisor (GCD) of these numbers: ", ". Give only the GCD as your final answer.",
    "Spell this word backward (example: sun -> nus): ",
    "State the final answer to the following arithmetic problem: ",
)  # fmt: skip
"""Of the questions, a token each."""
SIZES = {"eval": 400, "train": 1480, "warm_up": 6000}
"""Problems of each file."""
SEEDS = {"eval": 1_000_000, "train": 2_000_000, "warm_up": 3_000_000}
STEPS = 500
STAGES = 3

REFERENCE = "sent"
ARMS = {
    "sent": "ascending, two levels of KL",
    "sent:stage_column=none": "shuffled",
    "sent:stage_column=none,learning_rate=1e-4": "shuffled, rate 1e-4",
    "sent:stage_column=-stage": "descending",
    "sent:beta=0.0": "no KL",
    "sent:high_factor=0.5": "one level of KL",
    "sent:high_cov_ratio=0.1": "strong level on a tenth",
}
MEASURES = {
    "sampled": "held-out accuracy at the end, sampled",
    "greedy": "the same, greedy",
    "auc": "mean height of the sampled curve, at the start, half-way and at the end",
}


def hapo(*words: object) -> None:
    """A command that has to succeed."""
    if code := run([str(word) for word in words]):
        raise SystemExit(code)


def make_problems(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of each file in `folder`, as many of each task; no question is in two files."""
    seen: set[str] = set()
    made = {}
    for part, size in SIZES.items():
        rows = []
        for name, options in TASKS.items():
            count = size // len(TASKS)
            entries = reasoning_gym.create_dataset(name, seed=SEEDS[part], size=20 * count, **options)
            of_task: list[dict[str, str]] = []
            for entry in entries:
                if entry["question"] not in seen and len(of_task) < count:
                    seen.add(entry["question"])
                    row = {"question": entry["question"], "answer": str(entry["answer"]), "task": name}
                    of_task.append({**row, "completion": row["answer"]})
            rows += of_task
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        made[part] = rows
    return made


def make_tokenizer(rows: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """One token a character, and one for each of PHRASES."""
    characters = sorted({c for row in rows for c in row["question"] + row["answer"]})
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *characters, *PHRASES])}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    pattern = "|".join([*map(re.escape, PHRASES), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=128,
    )  # fmt: skip


def warm_up(work: Path) -> Path:
    """The folder of the model that all runs begin with."""
    folder, start = work / "warm_up", work / "start"
    if (folder / "model").is_dir():
        return folder / "model"
    rows = make_problems(work)
    torch.manual_seed(0)
    tokenizer = make_tokenizer([row for part in rows.values() for row in part])
    make_model(tokenizer).save_pretrained(start)
    tokenizer.save_pretrained(start)
    how = ["--resume", folder] if folder.is_dir() else ["--output_dir", folder]
    hapo("sft", "--config", "sft", "--method", "sft", "--model_name_or_path", start,
         "--dataset", work / "warm_up.jsonl", "--eval_file", work / "eval.jsonl", "--rewards", "exact",
         "--max_steps", STEPS, "--per_device_train_batch_size", 128, "--learning_rate", 1e-3, "--threads", 1,
         "--lr_scheduler_type", "constant_with_warmup", "--record_tokens_every", 0, "--evaluate_every", 100,
         "--per_device_eval_batch_size", 400, "--max_completion_length", 8, *how)  # fmt: skip
    return folder / "model"


def sort_problems(work: Path, model: Path) -> Path:
    """The training problems in stages."""
    folder = work / "curriculum"
    hapo("curriculum", "--config", RECIPE, *problems_of(work), "--model_name_or_path", model, "--samples", 8,
         "--stages", STAGES, "--output", folder)  # fmt: skip
    rows = pd.read_json(folder / "curriculum.jsonl", lines=True)
    rows["unequal"] = (rows.mean_reward > 0) & (rows.mean_reward < 1)
    for by in ("task", "stage"):
        print(rows.groupby(by)[["mean_reward", "unequal", "semantic_entropy"]].mean().round(3))
    print(pd.crosstab(rows.task, rows.stage))
    return folder / "curriculum.jsonl"


def problems_of(work: Path) -> list[Any]:
    """Where the problems are; compare chooses those to train on by task_seed 0."""
    return ["--dataset", work / "train.jsonl", "--eval_file", work / "eval.jsonl", "--task_seed", 0,
            "--extra_columns", "task"]  # fmt: skip


def by_task(work: Path) -> pd.DataFrame:
    """Percentage of right sampled held-out answers of each task, at the start and, by arm, at the end."""
    tasks = [json.loads(line)["task"] for line in (work / "eval.jsonl").read_text().splitlines()]
    means = []
    for arm, label in ARMS.items():
        for file in (work / "compare" / "runs" / arm.replace(":", "_")).glob("seed-*/evaluations.jsonl"):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            first, *_, last = [line["scores"] for line in lines if line["how"] == "sampled"]
            for when, scores in (("at the start", first), (label, last)):
                means += [{"when": when, "task": t, "right": 100 * r} for t, r in zip(tasks, scores, strict=True)]
    return pd.DataFrame(means).pivot_table(index="when", columns="task", values="right", sort=False).round(1)


def main() -> None:
    """Run what is missing, print the verdicts, and write the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sent_study"))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--rates", nargs="+", default=["3e-5", "1e-4", "3e-4", "1e-3"])
    parser.add_argument("--output", type=Path, default=Path("bench/results/sent_study.csv"))
    parser.add_argument("--model_only", action="store_true", help="make the problems and the model, no more")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    model = warm_up(given.work)
    if given.model_only:
        return
    curriculum = sort_problems(given.work, model)
    hapo("compare", "--config", RECIPE, *problems_of(given.work), "--model_name_or_path", model,
         "--curriculum", curriculum, "--arms", *ARMS, "--reference", REFERENCE, "--seeds", given.seeds,
         "--tune", *given.rates, "--tune_seeds", 1, "--jobs", 1,
         "--output_dir", given.work / "compare")  # fmt: skip
    runs = pd.read_csv(given.work / "compare" / "results.csv")
    runs["arm"] = runs.arm.map(ARMS)
    runs.to_csv(given.output, index=False)
    print_verdicts(runs, list(ARMS.values()), ARMS[REFERENCE], MEASURES)
    print(by_task(given.work))


if __name__ == "__main__":
    main()
