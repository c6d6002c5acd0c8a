"""`hapo eval`: greedy and sampled accuracy of a model on held-out problems."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from ..tasks import TaskConfig, load_task
from ..trl import HAPOConfig
from . import UsageError
from .measure import Answer, Decoding, draw_answers, estimate
from .progress import counting
from .recipe import RecipeParser
from .train import TrainOptions, model_path, prepare_process

DESCRIPTION = """Accuracy of a model on the held-out problems of a task, with 95 % intervals. Takes the recipe of
a training run; of it act the task, the model, max_completion_length, temperature, top_p, top_k, reward_weights,
per_device_eval_batch_size and seed."""


@dataclass
class EvalOptions:
    """What `hapo eval` takes beside a recipe."""

    samples: int = field(default=8, metadata={"help": "sampled answers to each problem, which are averaged"})
    output: str | None = field(
        default=None, metadata={"help": "write the figures to this .json, every answer to a .parquet beside it"}
    )


def main(argv: list[str]) -> int:
    """Measure, print, write, and return the exit code."""
    kinds = [TaskConfig, HAPOConfig, ModelConfig, TrainOptions, EvalOptions]
    task_config, args, model_config, training, options, _ = RecipeParser("hapo eval", DESCRIPTION, kinds).read(
        argv
    )
    if options.samples < 1:
        raise UsageError(f"samples must be at least 1, got {options.samples}")
    path, output = model_path(model_config), Path(options.output) if options.output else None
    if output is not None and (output.suffix != ".json" or not output.parent.is_dir()):
        raise UsageError(f"output must be a .json file in a folder that exists, got {output}")
    console = Console(highlight=False, markup=False)
    prepare_process(training)
    task = load_task(task_config, seed=args.seed)
    revision = {"revision": model_config.model_revision, "trust_remote_code": args.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(path, **revision)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=model_config.dtype, attn_implementation=model_config.attn_implementation, **revision
    ).to(args.device)

    sampling = {k: getattr(args, k) for k in ("temperature", "top_p", "top_k")} | {"samples": options.samples}
    figures: dict[str, Any] = {"model": path, "task": task.name, "fingerprint": task.fingerprint}
    rows: list[dict[str, Any]] = []
    for how, law in (("greedy", {}), ("sampled", sampling)):
        decoding = Decoding(
            max_new_tokens=args.max_completion_length,
            batch_size=args.per_device_eval_batch_size,
            seed=args.seed,
            **law,
        )
        with counting(console, how, len(task.eval) * decoding.samples) as advance:
            answers = draw_answers(
                model,
                tokenizer,
                task.eval,
                task.reward_funcs,
                decoding,
                weights=args.reward_weights,
                chat_template_kwargs=args.chat_template_kwargs,
                advance=advance,
            )
        found = estimate(answers)
        figures[how] = {**found.to_dict(), "decoding": asdict(decoding)}
        rows += [_row(how, answer, task.eval[answer.problem]) for answer in answers]
        note = f", mean of {found.samples}" if how == "sampled" else ""
        console.print(f"{how}: {found}  ({found.problems} problems{note})")
    if output is not None:
        output.write_text(json.dumps(figures, indent=2) + "\n")
        pq.write_table(pa.Table.from_pylist(rows), output.with_suffix(".parquet"), compression="zstd")
        console.print(f"figures: {output}, answers: {output.with_suffix('.parquet')}", soft_wrap=True)
    return 0


def _row(how: str, answer: Answer, problem: dict[str, Any]) -> dict[str, Any]:
    return {"decoding": how, "question": problem["question"], "gold": problem["answer"], **asdict(answer)}
