"""One rank of a torchrun, for all tests of two ranks, since starting one takes longer than its runs: two_ranks FOLDER.

Gradients on fixed completions go to FOLDER/NAME.safetensors for each of `SPLIT`, `ASYNCHRONOUS` and `DIFFUSION`, those on demonstrations for each of
`SUPERVISED`, and those of ours and TRL's for each of `trl_pairs`. Then comes a run with dynamic sampling and
records, in FOLDER/run, whose groups straddle ranks; it is resumed inside a rollout, and the metrics of both stand in
FOLDER/first.jsonl and FOLDER/run/metrics.jsonl. The gradients of scoring are checked here. Last comes `hapo train`,
in FOLDER/cli/demo.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from trl import SFTTrainer

from hapo.adapters import GateRAConfig
from hapo.cli import main
from hapo.engines.trl.rows import RolloutRows
from hapo.trl import HAPOTrainer
from tests.cli import small
from tests.engines import async_runs, fixed_diffusion, fixed_rollout, supervised_run, tiny
from tests.loops import small as agents
from tests.test_scoring import check_gradients_over_two_ranks


def some_digits(completions: list[str], **_) -> list[float | None]:
    """Another reward, which has nothing to say of completions that begin with a letter."""
    return [None if text[:1].isalpha() else float(sum(c.isdigit() for c in text)) for text in completions]


def digit_by_digit(completion_ids: list[list[int]], **_) -> list[float | list[float]]:
    """A reward per token, but for completions that begin with a digit, which have one for the whole."""
    digits = [[float(2 <= i <= 11) for i in ids] for ids in completion_ids]
    return [sum(row) if row[0] else row for row in digits]


def gated(net=None):
    """A model with a GateRA adapter that has moved, and the entropy of its gates in the loss."""
    torch.manual_seed(1)
    config = GateRAConfig(r=4, gate_std=0.5, init_weights=False, entropy_weight=0.5, task_type="CAUSAL_LM")
    return get_peft_model(tiny.model() if net is None else net, config)


class Gated(HAPOTrainer):
    """On such a model."""

    def __init__(self, model, *args, **kwargs):
        super().__init__(gated(model), *args, **kwargs)


SPLIT = {
    "hapo": {"method": "hapo"},
    "forking_tokens": {"method": "forking_tokens", "method_options": {"rho": 0.7}},
    "support": {"method": "hapo", "top_k": 6},
    "several": {
        "method": "dapo",
        "method_options": {
            "filter_groups": False,
            "multi_objective_aggregation": "normalize_then_sum",
            "off_policy_mask_threshold": 0.5,
        },
        "reward": [tiny.count_digits, some_digits],
        "reward_weights": [1.0, 0.5],
        "entropy_coef": 0.3,
    },
    "token_rewards": {
        "method": "hapo",
        "method_options": {"advantage": "token_reward", "gamma": 0.9},
        "reward": [digit_by_digit, some_digits],
        "reward_weights": [1.0, 0.5],
        "overlong_buffer": 4,
    },
    "gatera": {"method": "hapo", "kind": Gated},
    "hybrid": {
        "method": "egspo",
        "demonstrations": [{"prompt": f"{i}+{i}=", "completion": str(2 * i) * (i % 4 + 1)} for i in range(9)],
        "demonstration_weight": {"0": 0.6, "1": 0.3},
        "demonstration_method": "ranktuner",
        "demonstration_method_options": {"estimator": "exact"},
        "demonstrations_per_step": 5,
    },
}
"""Statistics of the rollout batch; a choice of tokens by the current policy in each optimiser step; several rewards,
each normalised, with the entropy term and the off-policy mask; lists and numbers of two of them as token rewards, with
a length penalty; gates beside; demonstrations, fewer than micro-batches."""


DIFFUSION = ("espo", "diffu_grpo")
"""Noise that is drawn over the rows of all ranks; end-of-sequence tokens count, or end a response."""

SUPERVISED = {
    "sft": {"method": "sft"},
    "ranktuner": {
        "method": "ranktuner",
        "method_options": {"estimator": "exact", "base_weight": 1},
        "run_records": True,
    },
    "gates": {"method": "dft", "net": gated},
}
"""Scored by TRL's fused head, by `hapo.scoring`, with records in FOLDER/supervised, and with gates beside."""

LAYOUTS = {
    "padded": {},
    "packed": {"packing": True, "max_length": 24},
    "padding_free": {"padding_free": True, "max_length": None},
}
TRLS = {"sft": "nll", "dft": "dft"}
"""A method, and TRL's `loss_type` of the same loss."""


def trl_pairs(rows: int):
    """Each supervised method that TRL has, in each layout, with accumulation 1 and 4: (name, ours, TRL's)."""
    for name, theirs in TRLS.items():
        for layout, options in LAYOUTS.items():
            for accumulation in (1, 4):
                cut = {"rows": rows // accumulation, "accumulation": accumulation, **options}
                label = f"{name}-{layout}-{accumulation}"
                yield label, {"method": name, **cut}, {"kind": SFTTrainer, "loss_type": theirs, **cut}


def run(folder: Path, checkpoint: Path | None):
    """Train, and check on every rank what was trained on."""
    trainer = tiny.trainer(
        folder,
        reward=tiny.half_mixed,
        per_device_train_batch_size=6,
        steps_per_generation=2,
        max_num_gen_batches=10,
        draw_ahead=True,
        run_records=True,
        record_tokens_every=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    batches = [RolloutRows.of(inputs).batch for inputs in trainer._buffered_inputs]
    used = trainer.accelerator.gather(torch.cat([b.group for b in batches]))
    alive = trainer.accelerator.gather(torch.cat([b.mask.any(1) for b in batches]))
    if trainer.accelerator.is_main_process:
        assert used.unique(return_counts=True)[1].tolist() == [4] * 6, used
        assert alive.all()
        assert batches[0].totals.sequences == 12
        assert trainer.state.log_history[0]["dynamic_sampling/kept"] == 1
    return trainer


ASYNCHRONOUS = {
    "async hapo": {"method": "hapo", "method_options": {"components": "BCD"}, "token_budget": 30},
    "async stapo": {"method": "stapo", "method_options": {"tau_p": 0.5}},
}
"""Of `async_runs`, with sixteen answers in a step."""


def asynchronous(folder: Path) -> None:
    own = folder / f"async {os.environ['RANK']}"  # each rank saves the model for itself
    for name, options in ASYNCHRONOUS.items():
        schedule = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        gradients, trainer = async_runs.run(own, own / name, **schedule, **options)
        if trainer.accelerator.is_main_process:
            flat = {f"{i}.{n}": g for i, step in enumerate(gradients.steps) for n, g in step.items()}
            save_file(flat, folder / f"{name}.safetensors")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    asynchronous(folder)
    for name, options in SPLIT.items():
        gradients, trainer = fixed_rollout.run(6, 1, 1, 2, **options)
        if trainer.accelerator.is_main_process:
            flat = {f"{i}.{n}": g for i, step in enumerate(gradients.steps) for n, g in step.items()}
            save_file(flat, folder / f"{name}.safetensors")
    for name in DIFFUSION:
        gradients = fixed_diffusion.run(6, method=name)
        if trainer.accelerator.is_main_process:
            flat = {f"{i}.{n}": g for i, step in enumerate(gradients) for n, g in step.items()}
            save_file(flat, folder / f"{name}.safetensors")
    for name, options in SUPERVISED.items():
        options = {**options, "net": options["net"]()} if "net" in options else options
        _, gradient, trainer = supervised_run.run(folder / "supervised", rows=2, accumulation=2, **options)
        if trainer.accelerator.is_main_process:
            save_file(gradient, folder / f"{name}.safetensors")
    for label, *both in trl_pairs(rows=4):
        for side, options in zip(("ours", "trl"), both, strict=True):
            loss, gradient, trainer = supervised_run.run(folder / "supervised", **options)
            if trainer.accelerator.is_main_process:
                save_file({**gradient, "loss": torch.tensor(loss)}, folder / f"{label}-{side}.safetensors")
    trainer = run(folder / "run", None)
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        shutil.copy(folder / "run/metrics.jsonl", folder / "first.jsonl")
    trainer.accelerator.wait_for_everyone()
    trainer = run(folder / "run", folder / "run/checkpoints/checkpoint-1")
    check_gradients_over_two_ranks()
    (folder / "scored").touch()
    gradient = agents.first_update()
    if trainer.accelerator.is_main_process:
        save_file(gradient, folder / "etpo.safetensors")
    (folder / "cli").mkdir(exist_ok=True)
    argv = small.train(folder / "cli/demo", max_steps=2, per_device_train_batch_size=4, eval_size=7)
    assert main(argv) == 0  # and ends the process group
