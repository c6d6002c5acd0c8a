"""One optimiser step of a supervised trainer, ours or TRL's, over eight short texts."""

from __future__ import annotations

from datasets import Dataset
from trl import SFTConfig

from hapo.trl import SupervisedConfig, SupervisedTrainer
from tests.engines import tiny

TEXTS = ["1+1=2", "abcdefghijabc", "7+8=15 ab", "0", "9+9=18", "abc", "1+2+3+4+5=15", "j+j"]
"""Targets of unequal number, so that means of micro-batches are not the mean of the step."""

CPU = {"use_cpu": True, "bf16": False, "activation_checkpointing": False}


def data(kind: str = "text") -> Dataset:
    if kind == "text":
        return Dataset.from_dict({"text": TEXTS})
    return Dataset.from_dict({"prompt": [text[:2] for text in TEXTS], "completion": [text[2:] for text in TEXTS]})


def run(
    tmp_path, kind=SupervisedTrainer, net=None, rows=8, accumulation=1, dataset=None, eval_dataset=None, **options
):
    """Loss as logged and gradient of one optimiser step over all texts."""
    method, peft = options.pop("method_object", None), options.pop("peft_config", None)
    defaults = {
        "output_dir": str(tmp_path),
        **CPU,
        "report_to": "none",
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    config = SupervisedConfig if kind is SupervisedTrainer else SFTConfig
    net = tiny.model() if net is None else net
    trainer = kind(
        net,
        config(**{**defaults, **options}),
        train_dataset=data() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=tiny.tokenizer(),
        **({} if method is None else {"method": method}),
        **({} if peft is None else {"peft_config": peft}),
    )
    gradients = {}
    hook = trainer.create_optimizer

    def watched(*args, **kwargs):
        optimizer = hook(*args, **kwargs)
        optimizer.register_step_pre_hook(
            lambda *_: gradients.update(
                {n: p.grad.detach().clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
            )
        )
        return optimizer

    trainer.create_optimizer = watched
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses[0], gradients, trainer
