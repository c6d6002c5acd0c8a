"""`hapo train --method etpo`: an agent in an environment, with `hapo.loops.etpo`, into a run folder like any
other."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..companions import ETPO as METHOD
from ..engines.estimate import Estimate
from ..engines.records import RunRecords, append_line, manifest, weights_hash
from ..engines.trl.card import model_card
from ..insight.run import Run
from ..loops.etpo import ETPO, STATE, States
from ..loops.options import ETPOConfig
from ..loops.packed import Packed
from ..loops.recorder import TurnRecorder
from ..loops.turns import Segment
from ..methods import Paper
from ..outputs import write_whole
from ..tasks.environments import load_environment
from . import INTERRUPTED, UsageError
from .held_out import read_lines
from .progress import LINE_EVERY, Interrupt, describe
from .recipe import RecipeParser, told
from .run_folder import (
    add_resume,
    check_folder,
    check_same_data,
    model_options,
    model_path,
    prepare_process,
    prolong,
    save_model,
    write_page,
)

DESCRIPTION = """Train an agent in an environment with ETPO. Flags: those of the loop and of TRL's ModelConfig.
Without --config or --model: adding numbers column by column, with the embedded tiny model."""


@dataclass
class AgentOptions:
    """What `hapo train --method etpo` takes beside loop and model."""

    evaluate: bool = field(
        default=True, metadata={"help": "measure the reward of held-out episodes before and after training"}
    )
    evaluate_every: int | None = field(
        default=None, metadata={"help": "updates between further measurements during training"}
    )
    evaluate_samples: int = field(
        default=1, metadata={"help": "sampled episodes of each held-out row, which are averaged"}
    )
    token_budget: int | None = field(
        default=None,
        metadata={
            "help": "stop after the update with which this many tokens of prompts and turns are reached, if "
            "max_steps does not come first"
        },
    )
    report: bool = field(default=True, metadata={"help": "write report.html into the run folder at the end"})
    threads: int | None = field(
        default=None,
        metadata={"help": "CPU threads of torch (default: torch's); the last bits of results depend on it"},
    )

    def __post_init__(self) -> None:
        for name in ("threads", "evaluate_every", "evaluate_samples", "token_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def train_agent(argv: list[str], checkpoint: bool | str | None) -> int:
    """Train, and return the exit code; the arguments are those that `hapo.cli.run_folder.resumed` gives."""
    parser = RecipeParser("hapo train", DESCRIPTION, [ETPOConfig, ModelConfig, AgentOptions], default="etpo")
    add_resume(parser)
    args, model_config, options, _ = parser.read(argv)
    if get_quantization_config(model_config) is not None:
        raise UsageError("load_in_4bit and load_in_8bit cannot be honoured by etpo: leave them out")
    prepare_process(options.threads)
    accelerator = Accelerator(cpu=args.use_cpu)
    first = accelerator.is_main_process
    console = Console(quiet=not first, highlight=False, markup=False)
    folder = Path(args.output_dir)
    process = {"process_index": accelerator.process_index, "output_dir": args.output_dir}
    as_run = SimpleNamespace(**process, run_records=True, resume_from_checkpoint=None)
    check_folder("train", as_run, model_config, resuming=checkpoint is not None)
    task = load_environment(
        args.environment,
        seed=args.seed,
        train_size=args.train_size,
        eval_size=args.eval_size,
        options=args.environment_options,
    )
    data = task.train._fingerprint
    check_same_data(task.name, data, gather_object([data]), Run(folder).manifest if checkpoint else {})
    path = model_path(model_config)
    model = AutoModelForCausalLM.from_pretrained(path, **model_options(model_config, None))
    tokenizer = AutoTokenizer.from_pretrained(path, revision=model_config.model_revision)
    weights = weights_hash(model)
    run = ETPO(model, tokenizer, task, args, get_peft_config(model_config), accelerator)
    if checkpoint is None:
        records = RunRecords.create(
            folder,
            {**told(args, model_config, options), "method": args.method, "environment": args.environment},
            manifest(
                args.seed,
                kind="agent",
                model=path,
                weights_sha256=weights,
                data_fingerprint=data,
                processes=accelerator.num_processes,
            ),
            accelerator.process_index,
        )
    else:
        run.load(_checkpoint(folder, checkpoint))
        accelerator.wait_for_everyone()  # all have read what the first one takes back now
        records = RunRecords.resume(folder, run.step, accelerator.process_index)
        if first:
            prolong(folder / "config.yaml", args.max_steps)
    accelerator.wait_for_everyone()
    console.print(
        f"etpo in {task.name}: {len(task.train)} rows to train on, {len(task.eval)} held out; run folder {folder}",
        soft_wrap=True,
    )
    course = _Course(run, records, options, console, folder)
    with Interrupt(console) as interrupt:
        finished = course.train(interrupt)
    if finished:
        _save(run, folder)
        if first:
            _write_card(run, folder, model_config)
        console.print(f"model: {folder / 'model'}", soft_wrap=True)
    if options.report and first:
        write_page(folder, console)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0 if finished else INTERRUPTED


class _Course:
    """A run from where it stands to its end: measurements, log lines, records and checkpoints."""

    def __init__(
        self, run: ETPO, records: RunRecords, options: AgentOptions, console: Console, folder: Path
    ) -> None:
        self.run, self.records, self.options, self.console, self.folder = run, records, options, console, folder
        args = run.args
        self.recorder = TurnRecorder(
            records,
            every=args.record_tokens_every,
            rows=args.record_tokens_rows,
            turns=args.turns_per_update,
            decode=run.tokenizer.batch_decode,
        )
        self.first = run.accelerator.is_main_process
        self._shown = time.monotonic()

    def train(self, interrupt: Interrupt) -> bool:
        """Update until the end; False where it was interrupted."""
        run, args = self.run, self.run.args
        if self.options.evaluate and run.step == 0:
            self.measure()
        for metrics in () if self._why() else run.steps(self._see):
            last = self._why() is not None
            self.recorder.write(run.step)
            if last or run.step % args.logging_steps == 0:
                self.records.add_metrics({**metrics, "step": run.step})
                self._show(metrics, last)
            every = self.options.evaluate_every
            if self.options.evaluate and not last and every is not None and run.step % every == 0:
                self.measure()
            stop = self._asked(interrupt)
            if last or stop or run.step % args.save_steps == 0:
                self.save()
            if last:
                break
            if stop:
                _say_how_to_resume(self.folder, self.first)
                return False
        if self.options.evaluate:
            self.measure()
        if self.first:
            end = {"steps": run.step, "num_tokens": run.num_tokens, "seconds": round(run.seconds, 3)}
            write_whole(self.folder / "finished.json", json.dumps({**end, "why": self._why()}, indent=2) + "\n")
        return True

    def _why(self) -> str | None:
        """What ends the run where it stands, as finished.json says it."""
        budget = self.options.token_budget
        if self.run.step == self.run.args.max_steps:
            return "max_steps"
        return "token_budget" if budget is not None and self.run.num_tokens >= budget else None

    def measure(self) -> None:
        """Append the held-out reward, greedy and sampled; not twice at the same step."""
        run, file = self.run, self.folder / "evaluations.jsonl"
        known = [{line["step"] for line in read_lines(file)}] if self.first else [set()]
        if run.step in set().union(*gather_object(known)):
            return
        for how, heat, samples in (
            ("greedy", 0.0, 1),
            ("sampled", run.args.temperature, self.options.evaluate_samples),
        ):
            began = time.monotonic()
            scores = run.measure(heat, samples)
            estimate = Estimate.from_scores(scores)
            self.console.print(f"step {run.step}, held out, {how}: {estimate}")
            if self.first:
                at = {"step": run.step, "num_tokens": run.num_tokens, "seconds": round(run.seconds, 3), "how": how}
                means = [round(sum(of) / len(of), 6) for of in scores]
                took = {"scores": means, "took": round(time.monotonic() - began, 1)}
                append_line(file, {**at, **estimate.to_dict(), **took})

    def save(self) -> None:
        """Write a checkpoint; older ones than are kept go once it is complete."""
        run, folder = self.run, self.folder / "checkpoints"
        target = folder / f"checkpoint-{run.step}"
        if self.first:
            shutil.rmtree(target, ignore_errors=True)  # of a run that was killed here
        run.accelerator.wait_for_everyone()
        run.save(target)
        if self.first:
            for old in _complete(folder)[: -run.args.save_total_limit]:
                shutil.rmtree(old)

    def _see(self, segments: list[Segment], packed: Packed, states: States) -> None:
        if self.recorder.takes(self.run.step):
            named = {
                {"value": "value", "logp": "logp_old", "ref_logp": "logp_ref"}.get(name, name): x[
                    packed.taken
                ].cpu()
                for name, x in states._asdict().items()
            }
            self.recorder.add(self.run.step, segments, named)

    def _show(self, metrics: dict[str, float], last: bool) -> None:
        if last or time.monotonic() - self._shown >= LINE_EVERY:
            self._shown = time.monotonic()
            self.console.print(f"step {self.run.step}/{self.run.args.max_steps}  {describe(metrics, 0.0, False)}")

    def _asked(self, interrupt: Interrupt) -> bool:
        """Whether any process was asked to stop."""
        accelerator = self.run.accelerator
        asked = torch.tensor(int(interrupt.caught), device=accelerator.device)
        return bool(accelerator.reduce(asked, "sum").item())


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def _checkpoint(folder: Path, asked: bool | str) -> Path:
    """The checkpoint to go on from: a path, or True for the last one."""
    if asked is not True:
        return Path(str(asked))
    found = _complete(folder / "checkpoints")
    if not found:
        raise UsageError(f"{folder} has no complete checkpoint to resume from: remove it, and start again")
    return found[-1]


def _say_how_to_resume(folder: Path, first: bool) -> None:
    if first:
        last = _complete(folder / "checkpoints")[-1].name
        print(f"{last} is saved; resume with: hapo train --resume {folder}", file=sys.stderr)


def _write_card(run: ETPO, folder: Path, model_config: ModelConfig) -> None:
    """The card of the saved model: README.md of the run folder, as those of other runs."""
    args = run.args
    peft = get_peft_config(model_config)
    rate, critic = args.learning_rate, args.critic_learning_rate
    card = model_card(
        folder,
        args.method,
        {name: getattr(args, name) for name in METHOD.options},
        Paper(METHOD.title, METHOD.arxiv, METHOD.year),
        base=str(model_config.model_name_or_path),
        adapter=None if peft is None else str(peft.peft_type.value),
        data={"environment": f"`{args.environment.rsplit('/', 1)[-1]}`", "training rows": len(run.task.train)},
        settings={
            "learning rate": f"{rate:g}" + ("" if critic is None else f", of the critic {critic:g}"),
            "agents": args.environments,
            "turns before an update": args.turns_per_update,
        },
        step=run.step,
        seed=args.seed,
        tags=["hapo"],
        weights="model",
    )
    write_whole(folder / "README.md", str(card))


def _save(run: ETPO, folder: Path) -> None:
    """The policy, or its adapter, with the tokenizer."""

    def write(target: str) -> None:
        if run.accelerator.is_main_process:
            run.networks.save_policy(Path(target))
            run.tokenizer.save_pretrained(target)

    process = SimpleNamespace(process_index=run.accelerator.process_index)
    save_model(SimpleNamespace(args=process, accelerator=run.accelerator, save_model=write), folder / "model")
