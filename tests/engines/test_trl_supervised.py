"""SupervisedTrainer: TRL's own numbers where they are right, and what the core computes, however a batch is cut."""

import math
from functools import cache

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import hapo
from hapo.parts.rank import expected_rank, target_rank
from hapo.parts.reduce import sequence_mean
from hapo.trl import HAPOConfig, SupervisedConfig, SupervisedTrainer
from tests.engines import tiny

TEXTS = ["1+1=2", "abcdefghijabc", "7+8=15 ab", "0", "9+9=18", "abc", "1+2+3+4+5=15", "j+j"]
"""Targets of unequal number, so that means of micro-batches are not the mean of the step."""

LAYOUTS = {
    "padded": {},
    "packed": {"packing": True, "max_length": 24},
    "padding_free": {"padding_free": True, "max_length": None},
}


def data(kind: str = "text") -> Dataset:
    if kind == "text":
        return Dataset.from_dict({"text": TEXTS})
    return Dataset.from_dict({"prompt": [text[:2] for text in TEXTS], "completion": [text[2:] for text in TEXTS]})


def run(tmp_path, kind=SupervisedTrainer, net=None, rows=8, accumulation=1, dataset=None, eval_dataset=None, **options):
    """Loss as logged and gradient of one optimiser step over all texts."""
    method, peft = options.pop("method_object", None), options.pop("peft_config", None)
    defaults = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    config = SupervisedConfig if kind is SupervisedTrainer else SFTConfig
    net = tiny.model(attn_implementation="eager") if net is None else net
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


def close(a, b, tolerance=1e-6):
    assert a.keys() == b.keys() and a
    assert max(x.abs().max() for x in a.values()) > 1e-3, "a gradient of zero shows nothing"
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], rtol=0, atol=tolerance)


@cache
def core(method: str, **options):
    """Loss and gradient by plain logits of each text alone, over the targets of all."""
    net = tiny.model()
    rows = [tiny.tokenizer()(text + "<eos>")["input_ids"] for text in TEXTS]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    logits = net(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
    targets, log_p = ids[:, 1:], logits.log_softmax(-1)
    batch = hapo.TokenBatch(
        mask=mask[:, 1:],
        logp=log_p.gather(-1, targets[..., None])[..., 0],
        entropy=-(log_p.exp() * log_p).sum(-1).detach(),
        rank=target_rank(logits.detach(), targets),
        expected_rank=expected_rank(logits.detach()),
    )
    loss = hapo.method(method, **options).loss(batch).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "theirs"), [("sft", "nll"), ("dft", "dft")])
def test_sft_and_dft_are_trl_s_nll_and_dft(name, theirs, layout, tmp_path):
    for accumulation in (1, 4):
        cut = {"rows": 8 // accumulation, "accumulation": accumulation, **LAYOUTS[layout]}
        loss, gradient, _ = run(tmp_path, method=name, **cut)
        loss_of_trl, gradient_of_trl, _ = run(tmp_path, SFTTrainer, loss_type=theirs, **cut)
        assert loss == pytest.approx(loss_of_trl, abs=1e-6)
        close(gradient, gradient_of_trl)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("name", "options"),
    [("chord_phi", {}), ("ranktuner", {}), ("ranktuner", {"estimator": "exact", "base_weight": 1})],
)
def test_the_gradient_is_the_core_s_however_the_batch_is_cut(name, options, accumulation, layout, tmp_path):
    expected, gradient_of_core = core(name, **options)
    cut = {"rows": 8 // accumulation, "accumulation": accumulation, **LAYOUTS[layout]}
    loss, gradient, _ = run(tmp_path, method=name, method_options=options, **cut)
    assert loss == pytest.approx(expected, abs=1e-5)
    close(gradient, gradient_of_core, 2e-6)
