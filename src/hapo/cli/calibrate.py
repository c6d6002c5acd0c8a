"""`hapo calibrate`: a temperature rule for decoding, with statistics of a model's answers to prompts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from rich.console import Console

from ..insight.finding import counted
from ..methods import TemperatureOptions
from ..samplers.rule import RULES, AnyRule, TemperatureRule, rule_options
from . import UsageError, check_output
from .cards import option_docs
from .contents import model_files

DESCRIPTION = """Write a temperature rule as JSON, which transformers, vLLM and SGLang take. The rules bounded and
zscore read statistics: the model answers the prompts at the temperature that is to be adapted, and the entropies
of what it drew are summed up. The rules dynatemp and edt read none, and nothing is loaded for them."""


def main(argv: list[str]) -> int:
    """Calibrate, print, write, and return the exit code."""
    options = _parser().parse_args(argv)
    temperature = _temperature(options)
    inputs = [*model_files(options.model), *([options.prompts] if options.prompts else [])]
    check_output(options.output, inputs=inputs, replace=options.replace)
    console = Console(highlight=False, markup=False)
    if isinstance(temperature, TemperatureOptions):
        rule = _calibrated(temperature, options, console)
    else:
        console.print(f"the rule {temperature.rule!r} reads no statistics: nothing was calibrated")
        rule = TemperatureRule(temperature)
    rule.save(options.output)
    console.print(f"rule: {options.output}", soft_wrap=True)
    return 0


def read_prompts(path: Path) -> list[Any]:
    """Prompts of a file: lines of text, or in .jsonl the column "prompt", a string or a list of messages.

    Raises:
        UsageError: the file cannot be read, has another form, or holds no prompt.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(f"prompts must be a .txt file (one a line) or a .jsonl file, got {path}")
    try:
        lines = [(i, line) for i, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the prompts cannot be read: {error}") from error
    if not lines:
        raise UsageError(f"{path} holds no prompts")
    if path.suffix == ".txt":
        return [line for _, line in lines]
    return [_prompt(line, f"{path}, line {i}") for i, line in lines]


def _prompt(line: str, where: str) -> Any:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is no JSON: {error}") from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    chat = isinstance(prompt, list) and all(isinstance(m, dict) and "role" in m for m in prompt)
    if not prompt or not (isinstance(prompt, str) or chat):
        raise UsageError(f'{where} must have a "prompt", a string or a list of messages, got {line[:80]}')
    return prompt


def _calibrated(temperature: TemperatureOptions, options: argparse.Namespace, console: Console) -> TemperatureRule:
    if options.model is None or options.prompts is None:
        raise UsageError(f"the rule {temperature.rule!r} reads statistics: name a --model and a file of --prompts")
    prompts = read_prompts(options.prompts)[: options.limit]
    from transformers import AutoModelForCausalLM, AutoTokenizer, utils

    from ..samplers.calibration import calibrate
    from .adapted import know_adapter
    from .progress import counting
    from .run_folder import named_model

    utils.logging.disable_progress_bar()
    path = named_model("model", options.model)
    know_adapter(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(path, dtype=options.dtype).to(options.device)
    with counting(console, "prompts", len(prompts)) as advance:
        stats = calibrate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=options.max_new_tokens,
            t_base=options.temperature,
            rho=temperature.rho,
            batch_size=options.batch_size,
            seed=options.seed,
            advance=advance,
        )
    console.print(
        f"{counted(len(prompts), 'prompt')}, {stats.tokens} tokens at temperature {options.temperature:g}"
    )
    console.print(
        f"log entropy: pivot {stats.pivot:.4f}, sigma {stats.sigma:.4f}, "
        f"h_max {stats.h_max:.4f}, h_min {stats.h_min:.4f}; {100 * stats.floored:.1f} % of the tokens floored",
        soft_wrap=True,
    )
    return TemperatureRule(temperature, stats)


def _temperature(options: argparse.Namespace) -> AnyRule:
    told = {name: value for name in _rule_options() if (value := getattr(options, name)) is not None}
    try:
        return rule_options(told)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hapo calibrate", description=DESCRIPTION, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="the .json file to write")
    add("--replace", action="store_true", help="write over the output, if it is there")
    add("--model", help="folder or Hub id; tiny is the bundled model")
    add("--prompts", type=Path, help='.txt, a prompt a line; or .jsonl with "prompt", a string or a chat')
    add("--limit", type=_positive, help="use the first so many prompts")
    add("--temperature", type=_above_zero, default=1.0, help="T_base: that of the requests")
    add("--max_new_tokens", type=_positive, default=256, help="longest answer")
    add("--batch_size", type=_positive, default=16, help="prompts answered at once")
    add("--seed", type=int, default=0, help="of the draws")
    add("--dtype", default="auto", help="of the weights")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the model")
    rule = parser.add_argument_group("the temperature rule")
    for name, (kind, choices, meaning) in _rule_options().items():
        rule.add_argument(f"--{name}", type=kind, choices=choices, help=meaning)
    return parser


def _rule_options() -> dict[str, tuple[type, Sequence[str] | None, str]]:
    """Option -> its type, its choices, and its meaning in each rule that has it."""
    kinds = {kind: [name for name in RULES if RULES[name] is kind] for kind in dict.fromkeys(RULES.values())}
    found: dict[str, tuple[type, Sequence[str] | None, list[str]]] = {
        "rule": (str, list(RULES), ["default: bounded"])
    }
    for kind, names in kinds.items():
        docs, types = option_docs(kind), get_type_hints(kind)
        for f in fields(kind):
            if f.name != "rule":
                choices = get_args(types[f.name]) if get_origin(types[f.name]) is Literal else None
                of = {float: float, int | None: int}.get(types[f.name], str)
                meaning = f"{', '.join(names)}: {docs[f.name].removesuffix('.')} (default: {f.default})"
                found.setdefault(f.name, (of, choices, []))[2].append(meaning)
    return {name: (of, choices, "; ".join(meanings)) for name, (of, choices, meanings) in found.items()}


def _positive(word: str) -> int:
    if int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {word}")
    return int(word)


def _above_zero(word: str) -> float:
    if not 0 < float(word) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0: greedy decoding has nothing to adapt; got {word}")
    return float(word)
