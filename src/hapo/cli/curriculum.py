"""`hapo curriculum`: training problems in stages, by how much a model's sampled answers to each of them differ."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import altair as alt
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from ..insight.figures import Figure
from ..insight.finding import counted
from ..outputs import check_made, write_made
from ..tasks import Task, TaskConfig, load_task
from ..tasks.curriculum import STAGE
from ..tasks.final_answers import AnswerSpace, Equality, answer_space
from ..tasks.semantic import Weight, answer_clusters, semantic_entropy, stages
from ..trl import HAPOConfig
from . import UsageError
from .contents import model_identity
from .evaluate import Draw, EngineOptions, start
from .measure import Decoding
from .model import AdaptedModelConfig
from .progress import counting
from .recipe import RecipeParser
from .run_folder import model_path, prepare_process
from .train import TrainOptions

DESCRIPTION = """Training problems in stages, from those on which a model's sampled answers agree to those on which
they differ: semantic entropy (SENT, arXiv 2512.04359). Takes the recipe of the training run that is to follow; of
it act the model, the task, max_completion_length, temperature, per_device_eval_batch_size, seed and
reward_weights. Stopped, it goes on where it was when it is called again. Alone: the embedded demo. Then: hapo
train --curriculum OUTPUT/curriculum.jsonl"""

ROWS, PICTURES, SUMMARY = "curriculum.jsonl", ("curriculum.png", "curriculum.svg"), "curriculum.json"

PER_BLOCK = {"transformers": 64, "vllm": 256}
"""Problems that are answered between two files of samples, about: what a kill costs."""
MADE_COLUMNS = {"semantic_entropy", "clusters", "no_answer", "mean_reward", STAGE}
BINS = 30


@dataclass
class CurriculumOptions(EngineOptions):
    """What `hapo curriculum` takes beside a recipe."""

    output: str = field(default="runs/curriculum", metadata={"help": "folder to write into"})
    samples: int = field(default=8, metadata={"help": "sampled answers to each problem"})
    stages: int = field(default=2, metadata={"help": "stages, of equally many problems"})
    weight: Weight = field(
        default="likelihood",
        metadata={"help": "what a cluster of equal answers weighs: their probabilities added up, or their number"},
    )
    equality: Equality = field(
        default="auto",
        metadata={"help": "which answers are equal: by math_verify, exact, or as the task's reward compares"},
    )
    problems: int | None = field(
        default=None, metadata={"help": "the first so many training problems (default: all)"}
    )
    on_no_answer: Literal["keep", "drop", "raise"] = field(
        default="keep",
        metadata={
            "help": "for problems of which no sample gives an answer: keep them, each sample a cluster of its own "
            "so that they come last; drop them; or raise"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 2:
            raise ValueError(f"samples must be at least 2, for one answer differs from none, got {self.samples}")
        for name in ("stages", "problems"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Place:
    """Where the files go, and of what they are made: a hash."""

    folder: Path
    of: str
    replace: bool

    def check(self, names: list[str]) -> None:
        """Raise FileExistsError unless these files may be written."""
        check_made(self.folder, names, self.of, self.replace)

    def has(self, name: str) -> bool:
        """Whether a file is there as an earlier call wrote it, of the same."""
        try:
            check_made(self.folder, [name], self.of)
        except FileExistsError:
            return False
        return (self.folder / name).is_file()

    def write(self, files: dict[str, str | bytes]) -> None:
        """Write these files."""
        write_made(self.folder, files, self.of, self.replace)


@dataclass(frozen=True)
class Sampled:
    """The answers to one problem."""

    texts: list[str]
    answers: list[str | None]
    """Final answers in canonical form; None for none."""
    clusters: list[int]
    logps: list[float]
    """Nats, of whole answers."""
    tokens: list[int]
    truncated: list[bool]
    scores: list[float]


def main(argv: list[str]) -> int:
    """Sample, sort, write, and return the exit code."""
    kinds = [TaskConfig, HAPOConfig, AdaptedModelConfig, TrainOptions, CurriculumOptions]
    parser = RecipeParser("hapo curriculum", DESCRIPTION, kinds)
    parser.set_defaults(bf16=False, activation_checkpointing=False)  # of training; they complain on a CPU
    parser.add_argument("--replace", action="store_true", help="write over what is in the folder")
    task_config, args, model_config, train_options, options, given = parser.read(argv)
    _check(task_config, args)
    console = Console(highlight=False, markup=False)
    prepare_process(train_options.threads)
    task = load_task(task_config, seed=args.seed)
    problems = _problems(task, options)
    blocks = _blocks(len(problems), args, options)
    of = _made_of(problems, task_config, args, model_config, options)
    place = Place(Path(options.output), of, given.replace)
    place.check([*map(_name, range(len(blocks))), ROWS, *PICTURES, SUMMARY])
    space = answer_space(options.equality, task.reward_funcs, task_config.reward_timeout)
    sampled = _sample(task, problems, blocks, space, place, args, model_config, options, console)
    rows = _rows(problems, sampled, options, console)
    place.write(_files(rows, of, options))
    console.print(_table(rows))
    file = place.folder / ROWS
    console.print(f"curriculum: {file}; train with: hapo train --curriculum {file}", soft_wrap=True)
    return 0


def _check(task_config: TaskConfig, args: HAPOConfig) -> None:
    if task_config.curriculum is not None:
        raise UsageError("curriculum is what this command makes: leave it out of the recipe")
    if task_config.environment is not None:
        raise UsageError(f"environment={task_config.environment!r}: a curriculum is of problems with one answer")
    if not args.temperature > 0:
        raise UsageError("at temperature 0 all samples of a problem are the same: set it above 0")
    if args.top_p != 1 or args.top_k:
        raise UsageError(
            f"top_p={args.top_p}, top_k={args.top_k}: the entropy is one of the policy itself; set them to 1 and 0"
        )


def _problems(task: Task, options: CurriculumOptions) -> Dataset:
    n = len(task.train) if options.problems is None else options.problems
    if n > len(task.train):
        raise UsageError(f"problems is {n}, but {task.name} has {len(task.train)} training problems: lower it")
    if options.stages > n:
        raise UsageError(f"{counted(n, 'problem')} cannot make {options.stages} stages: lower stages")
    if taken := MADE_COLUMNS & set(task.train.column_names):
        raise UsageError(f"the data have a column {', '.join(sorted(taken))}, which this command makes: rename it")
    return task.train.select(range(n))


def _blocks(n: int, args: HAPOConfig, options: CurriculumOptions) -> list[range]:
    """Problems that are answered together: whole batches, so that their answers are the same after a kill."""
    batch = max(1, args.per_device_eval_batch_size // options.samples)
    size = -(-PER_BLOCK[options.engine] // batch) * batch
    return [range(first, min(first + size, n)) for first in range(0, n, size)]


def _name(block: int) -> str:
    return f"samples/{block:06}.jsonl"


def _made_of(
    problems: Dataset, task: TaskConfig, args: HAPOConfig, model: AdaptedModelConfig, options: CurriculumOptions
) -> str:
    """A hash of all that the samples and their clusters depend on."""
    told: dict[str, Any] = {
        "model": model_identity(model_path(model), model.model_revision, args.trust_remote_code),
        "dtype": model.dtype,
        "attention": model.attn_implementation,
        "problems": list(problems),
        "chat": args.chat_template_kwargs,
        "decoding": asdict(_decoding(args, options, 0)),
        "seed": args.seed,
        "engine": [options.engine, options.vllm_options],
        "equality": options.equality,
        "rewards": [task.rewards, args.reward_weights],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _decoding(args: HAPOConfig, options: CurriculumOptions, block: int) -> Decoding:
    """Every block has a seed of its own."""
    seed = hashlib.sha256(f"{args.seed}/{block}".encode()).digest()
    return Decoding(
        max_new_tokens=args.max_completion_length,
        temperature=args.temperature,
        samples=options.samples,
        batch_size=args.per_device_eval_batch_size // options.samples * options.samples or options.samples,
        seed=int.from_bytes(seed[:4], "big"),
    )


def _sample(
    task: Task,
    problems: Dataset,
    blocks: list[range],
    space: AnswerSpace,
    place: Place,
    args: HAPOConfig,
    model_config: AdaptedModelConfig,
    options: CurriculumOptions,
    console: Console,
) -> list[Sampled]:
    """The samples of all problems: those of the files that an earlier call wrote, and for the rest new ones."""
    folder, draw = place.folder, None
    sampled: list[Sampled] = []
    there = [place.has(_name(block)) for block in range(len(blocks))]
    done = sum(len(one) for one, made in zip(blocks, there, strict=True) if made)
    if done:
        console.print(
            f"{counted(done, 'problem')} of {len(problems)} sampled already, in {folder}", soft_wrap=True
        )
    with counting(console, "samples", len(problems) * options.samples) as advance:
        for block, places in enumerate(blocks):
            file = _name(block)
            if there[block]:
                lines = (folder / file).read_text(encoding="utf-8").splitlines()
                sampled += [Sampled(**json.loads(line)) for line in lines]
                advance(len(places) * options.samples)
                continue
            draw = draw or _start(args, model_config, options)
            answers = draw(
                problems.select(places),
                task.reward_funcs,
                _decoding(args, options, block),
                weights=args.reward_weights,
                advance=advance,
                likelihood=True,
            )
            of_problem = [[one for one in answers if one.problem == i] for i in range(len(places))]
            new = [_sampled(one, space) for one in of_problem]
            place.write({file: "".join(json.dumps(asdict(one)) + "\n" for one in new)})
            sampled += new
    return sampled


def _start(args: HAPOConfig, model_config: AdaptedModelConfig, options: CurriculumOptions) -> Draw:
    engine = EngineOptions(options.engine)
    if options.engine == "vllm":
        assert not isinstance(options.vllm_options, str)
        # log-probs at the temperature of the samples
        engine.vllm_options = {**(options.vllm_options or {}), "logprobs_mode": "processed_logprobs"}
    return start(args, model_config, engine, model_path(model_config))


def _sampled(answers: list[Any], space: AnswerSpace) -> Sampled:
    """Of the `LikelyAnswer`s to one problem."""
    final = [space.canonical(one.text) for one in answers]
    return Sampled(
        texts=[one.text for one in answers],
        answers=final,
        clusters=answer_clusters(final, space.same),
        logps=[one.logp for one in answers],
        tokens=[one.tokens for one in answers],
        truncated=[one.truncated for one in answers],
        scores=[one.score for one in answers],
    )


def _rows(
    problems: Dataset, sampled: list[Sampled], options: CurriculumOptions, console: Console
) -> list[dict[str, Any]]:
    """The problems in the order of the curriculum, with entropy and stage; raises where there can be none."""
    silent = [place for place, one in enumerate(sampled) if not any(one.answers)]
    if len(silent) == len(sampled):
        raise ValueError(
            "no sample of any problem gives an answer, so that nothing tells the problems apart; the first says "
            f"{sampled[0].texts[0]!r:.200}. Raise max_completion_length, let prompt_template ask for an answer, "
            "or choose another equality"
        )
    if silent:
        first = f"the first: {problems[silent[0]]['question']!r:.80}"
        words = f"{len(silent)} of {counted(len(sampled), 'problem')}: no sample gives an answer ({first})"
        if options.on_no_answer == "raise":
            raise ValueError(f"{words}. Raise max_completion_length, or set on_no_answer to keep or drop")
        what = "dropped" if options.on_no_answer == "drop" else "each sample counts as an answer of its own"
        console.print(f"{words}; {what}", soft_wrap=True)
    dropped = set(silent) if options.on_no_answer == "drop" else set()
    places = [place for place in range(len(sampled)) if place not in dropped]
    if options.stages > len(places):
        raise ValueError(f"{counted(len(places), 'problem')} are left, for {options.stages} stages: lower stages")
    entropies = [semantic_entropy(sampled[i].logps, sampled[i].clusters, options.weight) for i in places]
    rows = []
    for stage, members in enumerate(stages(entropies, options.stages), 1):
        for member in members:
            one = sampled[places[member]]
            found = {
                "semantic_entropy": entropies[member],
                "clusters": len(set(one.clusters)),
                "no_answer": one.answers.count(None),
                "mean_reward": sum(one.scores) / len(one.scores),
                STAGE: stage,
            }
            rows.append({**problems[places[member]], **found})
    return rows


def _files(rows: list[dict[str, Any]], of: str, options: CurriculumOptions) -> dict[str, str | bytes]:
    figure = entropy_figure(rows)
    parts = [_part(rows, stage) for stage in range(1, options.stages + 1)]
    told = {"samples": options.samples, "weight": options.weight, "equality": options.equality, "of": of}
    return {
        ROWS: "".join(json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in rows),
        **{name: figure.drawn("svg" if name.endswith("svg") else "png") for name in PICTURES},
        SUMMARY: json.dumps({**told, "problems": len(rows), "stages": parts}, indent=2) + "\n",
    }


def _part(rows: list[dict[str, Any]], stage: int) -> dict[str, Any]:
    """A stage in figures."""
    of = [row for row in rows if row[STAGE] == stage]
    entropies = [row["semantic_entropy"] for row in of]
    mean = {name: sum(row[name] for row in of) / len(of) for name in ("clusters", "mean_reward")}
    return {"stage": stage, "problems": len(of), "least": min(entropies), "most": max(entropies), **mean}


def entropy_figure(rows: list[dict[str, Any]]) -> Figure:
    """How many problems have which semantic entropy, by stage."""
    top = max((row["semantic_entropy"] for row in rows), default=0.0) or 1.0
    count = Counter((min(int(row["semantic_entropy"] / top * BINS), BINS - 1), row[STAGE]) for row in rows)
    bars = [
        {"from": place * top / BINS, "to": (place + 1) * top / BINS, "problems": n, STAGE: f"stage {stage}"}
        for (place, stage), n in sorted(count.items())
    ]
    chart = (
        alt.Chart(alt.Data(values=bars))
        .mark_bar()
        .encode(
            x=alt.X("from:Q", bin="binned", title="semantic entropy (nats)"),
            x2="to:Q",
            y=alt.Y("problems:Q", title="problems", stack="zero"),
            color=alt.Color(f"{STAGE}:N", title=None, legend=alt.Legend(symbolType="square", symbolStrokeWidth=0)),
        )
    )
    look = "At 0 all samples agree; problems far to the right have as many answers as samples."
    return Figure("semantic-entropy", "Semantic entropy of the training problems", look, chart)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "problems", "entropy, nats", "clusters", "mean reward"):
        table.add_column(name, justify="right")
    for stage in sorted({row[STAGE] for row in rows}):
        part = _part(rows, stage)
        span = f"{part['least']:.3f} to {part['most']:.3f}"
        table.add_row(
            str(stage), str(part["problems"]), span, f"{part['clusters']:.1f}", f"{part['mean_reward']:.3f}"
        )
    return table
