"""One rank of a torchrun: two_ranks.py FOLDER [CHECKPOINT].

Dynamic sampling, records and a resume inside a rollout on several processes, with groups that straddle ranks.
"""

import sys
from pathlib import Path

import torch

from tests.engines import tiny


def reward(completions, i, **_):
    """Odd prompts always earn the same."""
    return [1.0 if k % 2 else float(len(c) % 2) for c, k in zip(completions, i, strict=True)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer = tiny.trainer(
        Path(sys.argv[1]),
        reward=reward,
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
    trainer.train(resume_from_checkpoint=sys.argv[2] if len(sys.argv) > 2 else None)
    used = trainer.accelerator.gather(torch.cat([b["hapo_group"] for b in trainer._buffered_inputs]))
    alive = trainer.accelerator.gather(torch.cat([b["hapo_mask"].any(1) for b in trainer._buffered_inputs]))
    if trainer.accelerator.is_main_process:
        assert used.unique(return_counts=True)[1].tolist() == [4] * 6, used
        assert alive.all()
        assert trainer._buffered_inputs[0]["hapo_totals"].sequences == 12
        assert trainer.state.log_history[0]["dynamic_sampling/kept"] == 1
    trainer.accelerator.wait_for_everyone()  # gloo aborts a rank whose peer has gone
    torch.distributed.destroy_process_group()
