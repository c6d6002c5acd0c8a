"""Whole training steps, HAPO and TRL's own trainer in turns: processor seconds, memory, and where they go.

    python -m bench.end_to_end --work smollm2 --problems mawps.jsonl --output bench/results/end_to_end_smollm2.json
    python -m bench.end_to_end --work demo --output bench/results/end_to_end_demo.json

`smollm2`: SmolLM2-135M-Instruct (`make smollm2`) on recipes/smollm2_gsm8k.yaml with the problems of a .jsonl file,
8 problems x 8 answers x 64 tokens; a turn is a rollout batch and its 4 optimiser steps. TRL has no dynamic
sampling, so HAPO's is off. `demo`: the embedded demo; a turn is 15 rollout batches, 60 of its 480 optimiser steps.

One thread, float32, the same seed, data, schedule and optimiser. Records are kept as by `hapo train`; TRL's
trainer keeps none. Phases are clocked alike in all: `generate` and `reward`, `score` the rest of a rollout
(log-probs of the old policy, advantages), `update` the rest of the turn. HAPO drops groups of equal rewards from
its updates, which saves work that depends on the policy: `mixed` is the share of answers in other groups, and
`--reward parity` rewards an even sum of token ids, so that nearly every group is mixed.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from transformers import TrainerCallback
from trl import GRPOTrainer

from hapo.cli.arms import TRL, Arm, Job, Recipe, parse_flags
from hapo.cli.one_run import LogLines, build
from hapo.cli.recipe import read_recipe

from .paired import machine
from .turns import Baton, alternate, report, shown

ROOT = Path(__file__).parents[1]
ARMS = {
    "smollm2": ("hapo", "trl:dapo", "trl:grpo"),
    "demo": ("hapo", "hapo:max_num_gen_batches=1", "trl:dapo", "trl:grpo"),
}
BATCHES = {"smollm2": 1, "demo": 15}
"""Rollout batches a turn."""
SMOLLM2 = {
    "dataset_config": "none",
    "test_split": "none",
    "eval_size": 16,
    "max_num_gen_batches": 1,
    "num_generations": 8,
    "max_completion_length": 64,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 4,
    "activation_checkpointing": False,
    "dtype": "float32",
    "use_cpu": True,
    "bf16": False,
    "threads": 1,
    "save_strategy": "no",
}


def parity(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """1 for an even sum of token ids."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


class Turns(TrainerCallback):
    """Takes the baton for some optimiser steps at a time, and clocks their phases."""

    def __init__(self, trainer: GRPOTrainer, baton: Baton, steps: int) -> None:
        self.baton, self.steps = baton, steps
        self._sums: Counter[str] = Counter()
        for phase, method in {
            "generate": "_generate_single_turn",
            "reward": "_calculate_rewards",
            "rollout": "_generate_and_score_completions",
        }.items():
            setattr(trainer, method, self._clocked(phase, getattr(trainer, method)))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            self._end(state)
            self._begin(state, control)

    def _begin(self, state: Any, control: Any) -> None:
        control.should_training_stop = not self.baton.begin()
        self._sums.clear()
        self._began, self._tokens = time.process_time(), state.num_input_tokens_seen

    def _end(self, state: Any) -> None:
        sums, turn = self._sums, time.process_time() - self._began
        self.baton.end(
            generate=sums["generate"],
            reward=sums["reward"],
            score=sums["rollout"] - sums["generate"] - sums["reward"],
            update=turn - sums["rollout"],
            tokens=state.num_input_tokens_seen - self._tokens,
            answer=sums["answer"] / sums["answers"],
            mixed=sums["mixed"] / sums["answers"],
        )

    def _clocked(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            output = method(*args, **kwargs)
            self._sums[phase] += time.process_time() - began
            if phase == "rollout":
                trained = output.get("hapo_mask", output["advantages"].unsqueeze(-1) != 0).any(-1)
                self._sums["answers"] += len(trained)
                self._sums["mixed"] += int(trained.sum())
                self._sums["answer"] += int(output["completion_mask"].sum())
            return output

        return clocked


def train(baton: Baton, *, job: Job, steps: int) -> None:
    """A contender: turns of `steps` optimiser steps each."""
    trainer = build(job).trainer
    trainer.remove_callback(LogLines)
    trainer.add_callback(Turns(trainer, baton, steps))
    trainer.train()


def plan(given: argparse.Namespace) -> tuple[list[str], dict[str, Any], int]:
    """Recipe, flags over it, and the optimiser steps of a turn."""
    recipe = Recipe(read_recipe("demo"), [])
    flags: dict[str, Any] = {}
    if given.work == "smollm2":
        recipe = Recipe(read_recipe(str(ROOT / "recipes" / "smollm2_gsm8k.yaml")), [])
        flags = SMOLLM2 | {"model_name_or_path": given.model, "dataset": str(given.problems)}
    if given.reward == "parity":
        flags["rewards"] = ["bench.end_to_end:parity"]
    _, args, *_ = parse_flags(recipe, flags)
    steps = (given.batches or BATCHES[given.work]) * args.updates_per_rollout
    return recipe, flags | {"max_steps": (1 + given.pairs) * steps}, steps


def table(result: dict[str, Any]) -> str:
    """Medians a turn with quartiles; HAPO's arms over TRL's, pair by pair."""
    phases = ("generate", "reward", "score", "update")
    lines = [f"{'a turn':28}{'CPU s':>22}{'wall s':>9}" + "".join(f"{p:>10}" for p in phases)]
    lines[0] += f"{'peak MiB':>10}{'tokens':>9}{'answer':>8}{'mixed':>7}"
    for name, figures in result["contenders"].items():
        middle = {key: value["median"] for key, value in figures.items()}
        line = f"{name:28}{shown(figures['cpu_s']):>22}{middle['wall_s']:9.2f}"
        line += "".join(f"{middle[p]:10.2f}" for p in phases)
        lines.append(
            line
            + f"{middle['peak_mib']:10.0f}{middle['tokens']:9.0f}{middle['answer']:8.1f}{middle['mixed']:7.2f}"
        )
    lines.append(f"\n{'ratio, pair by pair':48}{'CPU s':>22}{'peak':>22}")
    for name, ratio in result["ratios"].items():
        ours, _, theirs = name.partition(" / ")
        if not ours.startswith(TRL) and theirs.startswith(TRL):
            lines.append(f"{name:48}{shown(ratio['cpu_s']):>22}{shown(ratio['peak_mib']):>22}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=ARMS, required=True)
    parser.add_argument("--arms", nargs="+", help="default: those of the work")
    parser.add_argument("--problems", type=Path, help="smollm2: .jsonl with the columns question and answer")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="smollm2: its folder")
    parser.add_argument("--reward", choices=("task", "parity"), default="task")
    parser.add_argument("--batches", type=int, help="rollout batches a turn (default: 1 of smollm2, 15 of demo)")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    if given.work == "smollm2" and given.problems is None:
        parser.error("--work smollm2 needs --problems, a .jsonl file with the columns question and answer")

    arms = given.arms or ARMS[given.work]
    recipe, flags, steps = plan(given)
    begin = machine(packages=("torch", "trl", "transformers"))
    with tempfile.TemporaryDirectory() as folder:
        jobs = {name: Job(Arm(name), given.seed, Path(folder) / Arm(name).slug, recipe, flags) for name in arms}
        contenders = {name: functools.partial(train, job=job, steps=steps) for name, job in jobs.items()}
        turns, _ = alternate(contenders, pairs=given.pairs)
    result = {
        "machine": {**begin, "load_after": machine()["load"]},
        "settings": {
            **{name: value.name if isinstance(value, Path) else value for name, value in vars(given).items()},
            "optimiser steps a turn": steps,
            "problems_sha256": given.problems and hashlib.sha256(given.problems.read_bytes()).hexdigest(),
            "run records": "as by hapo train; none of TRL's trainer",
        },
        **report(turns),
        "turns": {name: [turn.flat() for turn in some] for name, some in turns.items()},
    }
    print(table(result))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
