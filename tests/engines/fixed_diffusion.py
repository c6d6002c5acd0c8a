"""One training run of a masked-diffusion model on fixed responses, with the gradients of each optimiser step."""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from hapo.samplers.diffusion import Decoded
from hapo.trl import DiffusionConfig, DiffusionTrainer
from tests.engines import tiny
from tests.engines.fixed_rollout import Gradients

LENGTH = 8
HERE = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "activation_checkpointing": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "seed": 7,
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny one with a mask token."""
    made = copy.deepcopy(tiny.tokenizer())
    made.add_special_tokens({"mask_token": "<mask>"})
    return made


def model(**config: Any) -> Any:
    """The tiny one, which attends in both directions."""
    return tiny.model(**{"is_causal": False, "vocab_size": len(tokenizer()), **config})


class OnFixed(DiffusionTrainer):
    """Its responses depend on the global row alone."""

    def make_sampler(self) -> Any:
        sampler = super().make_sampler()

        def decoded(net: Any, ids: Any, mask: Any, how: Any) -> Decoded:
            first = self.accelerator.process_index * len(ids)
            seeds = [torch.Generator().manual_seed(first + row) for row in range(len(ids))]
            drawn = torch.stack([torch.randint(1, len(tiny.ALPHABET), (LENGTH,), generator=g) for g in seeds])
            return Decoded(drawn, torch.zeros_like(drawn), torch.ones(drawn.shape))

        sampler.decoded = decoded
        return sampler


def run(per_device: int, **options: Any) -> list[dict[str, torch.Tensor]]:
    """Two optimiser steps on one rollout, each with masks of its own."""
    keep = Gradients()
    with tempfile.TemporaryDirectory() as folder:
        args = DiffusionConfig(
            folder,
            **HERE,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=1,
            steps_per_generation=1,
            num_iterations=2,
            num_generations=4,
            max_completion_length=LENGTH,
            max_steps=2,
            optim="sgd",
            lr_scheduler_type="constant",
            learning_rate=0.01,
            max_grad_norm=0.0,
            **{"beta": 0.0, **options},
        )
        trainer = OnFixed(
            model(), tiny.count_digits, args, train_dataset=tiny.data(), processing_class=tokenizer()
        )
        trainer.add_callback(keep)
        trainer.train()
    return keep.steps
