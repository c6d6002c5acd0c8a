"""A run that is killed without warning after some optimiser steps: killed_run.py FOLDER STEPS [OPTIONS as JSON]."""

import json
import os
import signal
import sys

import torch
from transformers import TrainerCallback

from tests.engines import tiny


class Kill(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = json.loads(sys.argv[3])
    reward = getattr(tiny, options.pop("reward"))
    trainer = tiny.trainer(sys.argv[1], reward=reward, **options)
    trainer.add_callback(Kill())
    trainer.train()
