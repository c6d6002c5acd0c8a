"""`hapo eval`: accuracy of a model on the held-out problems of a task, or on named sets."""

from __future__ import annotations

import functools
import io
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ..engines.records import manifest
from ..insight.finding import counted
from ..outputs import file_hash, write_whole
from ..samplers.transformers import say_what_model_asked
from ..tasks import TaskConfig, load_task
from ..tasks.benchmarks import BENCHMARKS, ProblemSet, load_benchmark
from ..trl import HAPOConfig
from . import UsageError, check_output
from .adapted import know_adapter
from .benchmark import (
    PRESET_LENGTH,
    PRESETS,
    averages,
    figures_of,
    mark_truncated_wrong,
    rows_of,
    table_of,
)
from .contents import model_files, reward_files
from .measure import Answer, Decoding, draw_answers, estimate
from .model import AdaptedModelConfig
from .progress import counting
from .recipe import RecipeParser
from .run_folder import model_path, prepare_process
from .train import TrainOptions
from .vllm_answers import VLLMAnswers

DESCRIPTION = """Accuracy of a model with 95 % intervals: on the held-out problems of a task, or on the sets of
--benchmarks. Takes the recipe of a training run; of it act the model, max_completion_length, temperature, top_p,
top_k, per_device_eval_batch_size, seed, and of the task chat, system_prompt and prompt_template; without
--benchmarks also the other options of the task and reward_weights."""

TABLE_WIDTH = 110

Draw = Callable[..., list[Answer]]
"""`draw_answers` with its model, or what stands in for it."""


@dataclass
class EngineOptions:
    """What draws answers."""

    engine: Literal["transformers", "vllm"] = field(
        default="transformers", metadata={"help": "what draws the answers"}
    )
    vllm_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "further options of vllm.LLM: a mapping, on the command line as JSON"}
    )

    def __post_init__(self) -> None:
        if isinstance(self.vllm_options, str):
            try:
                self.vllm_options = json.loads(self.vllm_options)
            except ValueError as error:
                raise ValueError(f"vllm_options is no JSON: {self.vllm_options!r} ({error})") from error
        if not isinstance(self.vllm_options, dict | None):
            raise ValueError(f"vllm_options must be a mapping, not {self.vllm_options!r}")
        if self.vllm_options is not None and self.engine != "vllm":
            raise ValueError(f"vllm_options goes with --engine vllm, not with {self.engine}")


@dataclass
class EvalOptions(EngineOptions):
    """What `hapo eval` takes beside a recipe."""

    samples: int = field(default=8, metadata={"help": "sampled answers to each problem, which are averaged"})
    output: str | None = field(
        default=None, metadata={"help": "write the figures to this .json, every answer to a .parquet beside it"}
    )
    benchmarks: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"one or more of {', '.join(BENCHMARKS)}, addition, reasoning_gym:NAME, files of your own"
        },
    )
    benchmark_folder: str | None = field(
        default=None, metadata={"help": "folder with NAME.jsonl of each named set (default: the Hub)"}
    )
    problems: int | None = field(
        default=None, metadata={"help": "measure on this many problems of each of the benchmarks (default: all)"}
    )
    preset: Literal["paper"] | None = field(
        default=None,
        metadata={
            "help": "protocol: paper is temperature 0.5, top-p 0.7, 8 samples; over the recipe, under the flags"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "problems"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        doubled = sorted({name for name in self.benchmarks if self.benchmarks.count(name) > 1})
        if doubled:
            raise ValueError(f"benchmarks names {', '.join(doubled)} more than once")
        for name in ("benchmark_folder", "problems", "preset"):
            if getattr(self, name) is not None and not self.benchmarks:
                raise ValueError(f"{name} goes with benchmarks, and none is named")


def main(argv: list[str]) -> int:
    """Measure, print, write, and return the exit code."""
    task_config, args, model_config, training, options, given = _read(argv)
    path, output = model_path(model_config), Path(options.output) if options.output else None
    if output is not None:
        if output.suffix != ".json" or not output.parent.is_dir():
            raise UsageError(f"output must be a .json file in a folder that exists, got {output}")
        inputs = _inputs(given.config, task_config, options, path)
        check_output(output, output.with_suffix(".parquet"), inputs=inputs, replace=given.replace)
    console = Console(highlight=False, markup=False)
    prepare_process(training.threads)
    measure = _measure_benchmarks if options.benchmarks else _measure_task
    figures, rows = measure(task_config, args, model_config, options, path, console)
    if output is not None:
        answers, table = output.with_suffix(".parquet"), io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), table, compression="zstd")
        for file in (output, answers) if not given.replace else ():  # what came meanwhile is not ours either
            check_output(file, replace=False)
        write_whole(answers, table.getvalue())
        write_whole(output, json.dumps(figures, indent=2) + "\n")
        console.print(f"figures: {output}, answers: {answers}", soft_wrap=True)
    return 0


def _read(argv: list[str]) -> tuple[Any, ...]:
    """The options; those of a preset stand under the flags and over the recipe."""
    parsed = _parser().read(argv)
    preset = parsed[4].preset
    if preset is None:
        return parsed
    parser = _parser()
    parser.set_defaults(max_completion_length=PRESET_LENGTH)
    return parser.read([*(word for k, v in PRESETS[preset].items() for word in (f"--{k}", str(v))), *argv])


def _parser() -> RecipeParser:
    parser = RecipeParser(
        "hapo eval", DESCRIPTION, [TaskConfig, HAPOConfig, AdaptedModelConfig, TrainOptions, EvalOptions]
    )
    parser.set_defaults(bf16=False, activation_checkpointing=False)  # of training; they complain on a CPU
    parser.add_argument("--replace", action="store_true", help="write over the output, if it is there")
    return parser


def _inputs(config: str | None, task_config: TaskConfig, options: EvalOptions, model: str) -> list[Path]:
    """All files that are read, and some that may be."""
    names = [config, task_config.dataset, task_config.eval_file, *options.benchmarks]
    folder = options.benchmark_folder
    sets = [] if folder is None else [Path(folder) / f"{name}.jsonl" for name in options.benchmarks]
    rewards = [file for _, file in reward_files(task_config.rewards) if file is not None]
    return [*(Path(name).expanduser() for name in names if name), *sets, *rewards, *model_files(model)]


def _measure_task(
    task_config: TaskConfig,
    args: HAPOConfig,
    model_config: AdaptedModelConfig,
    options: EvalOptions,
    path: str,
    console: Console,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Greedy and sampled accuracy on the held-out problems; figures, and a row for every answer."""
    if task_config.environment is not None:
        raise UsageError(
            f"environment={task_config.environment!r}: episodes are measured by hapo train, before its first step "
            "and after its last; leave environment out for single answers"
        )
    task = load_task(task_config.without_demonstrations(), seed=args.seed)
    draw = start(args, model_config, options, path)
    figures: dict[str, Any] = {"model": path, "task": task.name, "fingerprint": task.fingerprint}
    rows: list[dict[str, Any]] = []
    for how, sampling in (("greedy", {}), ("sampled", _sampling(args, options))):
        decoding = _decoding(args, **sampling)
        with counting(console, how, len(task.eval) * decoding.samples) as advance:
            answers = draw(task.eval, task.reward_funcs, decoding, weights=args.reward_weights, advance=advance)
        found = estimate(answers)
        figures[how] = {**found.to_dict(), "decoding": asdict(decoding)}
        for answer in answers:
            problem = task.eval[answer.problem]
            gold = problem["answer"]
            gold = {"question": problem["question"], "gold": gold if isinstance(gold, str) else json.dumps(gold)}
            rows.append({"decoding": how, **gold, **asdict(answer)})
        note = f", mean of {found.samples}" if how == "sampled" else ""
        console.print(f"{how}: {found}  ({counted(found.problems, 'problem')}{note})")
    return figures, rows


def _measure_benchmarks(
    task_config: TaskConfig,
    args: HAPOConfig,
    model_config: AdaptedModelConfig,
    options: EvalOptions,
    path: str,
    console: Console,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The table of the named sets; figures, and a row for every answer."""
    if args.temperature == 0 and options.samples > 1:
        raise UsageError("at temperature 0 all samples of a problem are the same: set samples to 1")
    problem_sets = _problem_sets(task_config, options)
    draw = start(args, model_config, options, path)
    decoding = _decoding(args, **_sampling(args, options))
    sets: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for one in problem_sets:
        with counting(console, one.name, len(one.problems) * decoding.samples) as advance:
            answers = mark_truncated_wrong(draw(one.problems, [one.reward], decoding, advance=advance))
        sets[one.name] = figures_of(one, answers)
        rows += rows_of(one, answers)
    console.width = max(console.width, TABLE_WIDTH)
    console.print(table_of(sets))
    console.print(f"\n{_protocol(options, decoding)}", soft_wrap=True)
    for one in problem_sets:
        if one.unreadable:
            console.print(f"{one.name}: {one.unreadable} gold answers cannot be read and count as unsolved")
        if one.source != "generated" and not one.verified:
            console.print(f"{one.name}: counted, not verified: no hash of these {one.of} problems is known")
    figures = {
        **manifest(args.seed),
        "model": path,
        "weights": _weights(path, _source(args, model_config)),
        "protocol": {
            "preset": options.preset,
            **asdict(decoding),
            "engine": options.engine,
            "vllm_options": options.vllm_options,
            "dtype": model_config.dtype,
            "chat": task_config.chat,
            "system_prompt": task_config.system_prompt,
            "prompt_template": task_config.prompt_template,
            "chat_template_kwargs": args.chat_template_kwargs,
        },
        "sets": sets,
        "average": averages(sets),
    }
    return figures, rows


def _problem_sets(task_config: TaskConfig, options: EvalOptions) -> list[ProblemSet]:
    folder = None if options.benchmark_folder is None else Path(options.benchmark_folder)
    sets: list[ProblemSet] = []
    for name in options.benchmarks:
        try:
            one = load_benchmark(name, task_config, folder=folder, size=options.problems)
        except (ValueError, FileNotFoundError) as error:
            raise UsageError(str(error)) from error
        if one.name in (other.name for other in sets):
            raise UsageError(f"two benchmarks go by the name {one.name}: rename a file")
        sets.append(one)
    return sets


def _sampling(args: HAPOConfig, options: EvalOptions) -> dict[str, Any]:
    return {k: getattr(args, k) for k in ("temperature", "top_p", "top_k")} | {"samples": options.samples}


def _decoding(args: HAPOConfig, **sampling: Any) -> Decoding:
    return Decoding(
        max_new_tokens=args.max_completion_length,
        batch_size=args.per_device_eval_batch_size,
        seed=args.seed,
        **sampling,
    )


def start(args: HAPOConfig, model_config: AdaptedModelConfig, options: EngineOptions, path: str) -> Draw:
    """Load the model; what draws its answers."""
    own: GenerationConfig
    draw: Draw
    source = _source(args, model_config)
    tokenizer = AutoTokenizer.from_pretrained(path, **source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if options.engine == "vllm":
        assert not isinstance(options.vllm_options, str)
        vllm_options = {
            **source,
            "dtype": model_config.dtype,
            "seed": args.seed,
            **(options.vllm_options or {}),
        }
        engine = VLLMAnswers(path, tokenizer, vllm_options)
        own, draw = engine.generation_config, engine.draw
    else:
        know_adapter(path)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=model_config.dtype, attn_implementation=model_config.attn_implementation, **source
        ).to(args.device)
        own, draw = model.generation_config, functools.partial(draw_answers, model, tokenizer)
    if said := say_what_model_asked(own):
        print(said, file=sys.stderr)
    return functools.partial(draw, chat_template_kwargs=args.chat_template_kwargs)


def _protocol(options: EvalOptions, decoding: Decoding) -> str:
    """Which protocol was used, in words."""
    sampling = f"temperature {decoding.temperature:g}, top-p {decoding.top_p:g}"
    if decoding.top_k:
        sampling += f", top-k {decoding.top_k}"
    name = ""
    if options.preset is not None:
        used = asdict(decoding)
        changed = [k for k, v in PRESETS[options.preset].items() if used[k] != v]
        name = f"{options.preset}{' except for ' + ', '.join(changed) if changed else ''}: "
    samples = f"{decoding.samples} sample{'s' if decoding.samples > 1 else ''}"
    return (
        f"protocol: {name}{sampling}, {samples}, at most {decoding.max_new_tokens} tokens, seed {decoding.seed}, "
        f"{options.engine}; in %, intervals 95 % over problems; truncated answers count as wrong"
    )


def _source(args: HAPOConfig, model_config: AdaptedModelConfig) -> dict[str, Any]:
    return {"revision": model_config.model_revision, "trust_remote_code": args.trust_remote_code}


def _weights(path: str, source: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of each file of weights in a folder; the commit of a model on the Hub."""
    if not Path(path).is_dir():
        return {"revision": AutoConfig.from_pretrained(path, **source)._commit_hash}
    files = sorted(file for kind in ("*.safetensors", "*.bin") for file in Path(path).glob(kind))
    return {file.name: file_hash(file) for file in files}
