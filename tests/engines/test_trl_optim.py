"""The optimisers of hapo.optim by name, in both trainers and on the command line, with a checkpoint and a resume."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hapo.cli import main
from hapo.optim import OptimisticAdagrad, OptimisticSGD
from hapo.trl import HAPOConfig, HAPOTrainer, SupervisedConfig, SupervisedTrainer
from tests.cli.small import train
from tests.engines import tiny
from tests.engines.supervised_run import CPU, data

RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 0.05, "weight_decay": 0.01}
NAMED = {
    "oadagrad": (
        "oadagrad",
        "delta=0.5, include_g0=false",
        OptimisticAdagrad,
        {"delta": 0.5, "include_g0": False, "lag": 0},
    ),
    "lag": ("oadagrad", "delta=0.5,lag=1", OptimisticAdagrad, {"delta": 0.5, "include_g0": True, "lag": 1}),
    "osg": ("osg", None, OptimisticSGD, {}),
}


@pytest.fixture(autouse=True, scope="module")
def _little_to_collect() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def policy(folder, optimizer=None, **options):
    config = tiny.config(folder, method="dapo", **RUN, **options)
    return HAPOTrainer(
        tiny.model(),
        tiny.count_digits,
        config,
        train_dataset=tiny.data(),
        processing_class=tiny.tokenizer(),
        optimizer_cls_and_kwargs=optimizer,
    )


def supervised(folder, optimizer=None, **options):
    defaults = {"report_to": "none", "per_device_train_batch_size": 2, "logging_steps": 1, "disable_tqdm": True}
    config = SupervisedConfig(str(folder), **CPU, **RUN, **defaults, dataloader_pin_memory=False, **options)
    return SupervisedTrainer(
        tiny.model(),
        config,
        train_dataset=data(),
        processing_class=tiny.tokenizer(),
        **({} if optimizer is None else {"optimizer_cls_and_kwargs": optimizer}),
    )


def weights(trainer):
    return {name: p.detach() for name, p in trainer.model.named_parameters()}


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.parametrize("case", NAMED)
@pytest.mark.parametrize("make", [policy, supervised])
def test_by_name_with_a_checkpoint_a_run_resumes_bit_for_bit(make, case, tmp_path):
    name, text, kind, options = NAMED[case]
    given = {"optim": name, "optim_args": text}
    trainer = make(tmp_path / "a", **given)
    trainer.train()
    inner = trainer.optimizer.optimizer
    assert type(inner) is kind and trainer.args.optim == name
    assert all(group[name] == value for group in inner.param_groups for name, value in options.items())
    assert [group["weight_decay"] for group in inner.param_groups] == [0.01, 0.0]
    resumed = make(tmp_path / "b", **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-3"))
    assert same(weights(trainer), weights(resumed))
    saved = load_file(tmp_path / "a/checkpoint-6/model.safetensors")
    kept = {name: x for name, x in weights(trainer).items() if name in saved}
    assert len(kept) > 10 and same(kept, {name: saved[name] for name in kept}), "what is saved is z"
    assert not any(torch.equal(inner.x(p), p) for p in trainer.model.parameters())


@pytest.mark.parametrize("make", [policy, supervised])
def test_a_class_with_its_options_is_the_name(make, tmp_path):
    named = make(tmp_path / "a", optim="oadagrad", optim_args="delta=0.5")
    named.train()
    handed = make(tmp_path / "b", optimizer=(OptimisticAdagrad, {"lr": 0.05, "delta": 0.5}))
    handed.train()
    other = make(tmp_path / "c", optim="oadagrad", optim_args="delta=0.7")
    other.train()
    assert same(weights(named), weights(handed)) and not same(weights(named), weights(other))


def test_two_optimisers_are_refused(tmp_path):
    net = tiny.model()
    with pytest.raises(ValueError, match="optimizers and optimizer_cls_and_kwargs are both given"):
        HAPOTrainer(
            net,
            tiny.count_digits,
            tiny.config(tmp_path),
            train_dataset=tiny.data(),
            processing_class=tiny.tokenizer(),
            optimizer_cls_and_kwargs=(OptimisticSGD, {}),
            optimizers=(torch.optim.SGD(net.parameters()), None),
        )


def test_transformers_own_optimisers_stay(tmp_path):
    trainer = policy(tmp_path, optim="sgd")
    assert type(trainer.create_optimizer()) is torch.optim.SGD and trainer.args.optim == "sgd"


@pytest.mark.parametrize("config", [HAPOConfig, SupervisedConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "oadagard"}, "there is no optimizer 'oadagard'; did you mean 'oadagrad'"),
        (
            {"optim": "oadagrad", "optim_args": "detla=1"},
            "optim 'oadagrad' has no option 'detla'; did you mean 'del",
        ),
        ({"optim": "osg", "optim_args": "delta=1"}, "optim 'osg' has no option 'delta'"),
        ({"optim": "oadagrad", "optim_args": "delta=-1"}, "delta must be above 0 and finite, got -1.0"),
        ({"optim": "oadagrad", "optim_args": "delta=big"}, "delta must be a number, got 'big'"),
        ({"optim": "oadagrad", "optim_args": "lag=2"}, "lag must be 0 or 1, got 2"),
        ({"optim": "oadagrad", "optim_args": "include_g0=2"}, "include_g0 must be true or false, got '2'"),
        ({"optim": "oadagrad", "optim_args": "lr=1"}, "set lr by the option learning_rate"),
        ({"optim": "osg", "weight_decay": -1.0}, "weight_decay must be at least 0 and finite, got -1.0"),
        ({"optim": "osg", "adam_beta1": 0.5}, "adam_beta1=0.5 cannot be honoured: optim='osg' has no such option"),
    ],
)
def test_what_an_optimiser_cannot_take_is_refused_by_the_config(config, options, message):
    with pytest.raises(ValueError, match=message):
        config("unused", **CPU, **options)


def test_the_command_line_takes_the_name_and_keeps_it(tmp_path):
    """In the run's own recipe too, from which it is resumed: here prolonged, which is one run of that length."""
    given = {"optim": "oadagrad", "optim_args": "delta=0.5", "evaluate": False, "lr_scheduler_type": "constant"}
    whole, short = tmp_path / "whole", tmp_path / "short"
    assert main(train(whole, **given, max_steps=4)) == 0
    assert main(train(short, **given, max_steps=2)) == 0
    assert main(["train", "--resume", str(short), "--max_steps", "4"]) == 0
    told = yaml.safe_load((short / "config.yaml").read_text())
    assert told["optim"] == "oadagrad" and told["optim_args"] == "delta=0.5"
    a, b = (load_file(folder / "model/model.safetensors") for folder in (whole, short))
    assert same(a, b)
