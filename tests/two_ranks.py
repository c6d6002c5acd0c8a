"""One rank of a torchrun, for all tests of two ranks, since starting one takes longer than its runs: two_ranks FOLDER.

Gradients on fixed completions go to FOLDER/NAME.safetensors for each of `SPLIT`, those on demonstrations for each of
`SUPERVISED`. Then comes a run with dynamic
sampling and records, in FOLDER/run, whose groups straddle ranks; it is resumed inside a rollout, and the metrics of
both stand in FOLDER/first.jsonl and FOLDER/run/metrics.jsonl. The gradients of scoring are checked here. Last comes
`hapo train`, in FOLDER/cli/demo.
"""

import shutil
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file

from hapo.adapters import GateRAConfig
from hapo.cli import main
from hapo.engines.trl.rows import RolloutRows
from hapo.trl import HAPOTrainer
from tests.cli import small
from tests.engines import fixed_rollout, supervised_run, tiny
from tests.test_scoring import check_gradients_over_two_ranks


def some_digits(completions: list[str], **_) -> list[float | None]:
    """Another reward, which has nothing to say of completions that begin with a letter."""
    return [None if text[:1].isalpha() else float(sum(c.isdigit() for c in text)) for text in completions]


class Gated(HAPOTrainer):
    """With a GateRA adapter that has moved, and the entropy of its gates in the loss."""

    def __init__(self, model, *args, **kwargs):
        torch.manual_seed(1)
        config = GateRAConfig(r=4, gate_std=0.5, init_weights=False, entropy_weight=0.5, task_type="CAUSAL_LM")
        super().__init__(get_peft_model(model, config), *args, **kwargs)


SPLIT = {
    "hapo": {"method": "hapo"},
    "forking_tokens": {"method": "forking_tokens", "method_options": {"rho": 0.7}},
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
each normalised, with the entropy term and the off-policy mask; gates beside; demonstrations, fewer than micro-batches."""

SUPERVISED = {"sft": {}, "ranktuner": {"estimator": "exact", "base_weight": 1}}
"""Scored by TRL's fused head, and by `hapo.scoring`."""


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


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for name, options in SPLIT.items():
        gradients, trainer = fixed_rollout.run(6, 1, 1, 2, **options)
        if trainer.accelerator.is_main_process:
            flat = {f"{i}.{n}": g for i, step in enumerate(gradients.steps) for n, g in step.items()}
            save_file(flat, folder / f"{name}.safetensors")
    for name, options in SUPERVISED.items():
        made = {"method": name, "method_options": options, "rows": 2, "accumulation": 2}
        _, gradient, trainer = supervised_run.run(folder / "supervised", **made)
        if trainer.accelerator.is_main_process:
            save_file(gradient, folder / f"{name}.safetensors")
    trainer = run(folder / "run", None)
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        shutil.copy(folder / "run/metrics.jsonl", folder / "first.jsonl")
    trainer.accelerator.wait_for_everyone()
    trainer = run(folder / "run", folder / "run/checkpoints/checkpoint-1")
    check_gradients_over_two_ranks()
    (folder / "scored").touch()
    (folder / "cli").mkdir(exist_ok=True)
    argv = small.train(folder / "cli/demo", max_steps=2, per_device_train_batch_size=4, eval_size=7)
    assert main(argv) == 0  # and ends the process group
