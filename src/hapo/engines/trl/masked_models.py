"""Loading of masked-diffusion models: they need not be able to `generate`, and Dream is no causal one by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, GenerationConfig, set_seed
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from trl.trainer.utils import create_model_from_path

from .config import HAPOConfig


def load(
    name: str, args: HAPOConfig, quantization_config: Any = None, processing_class: Any = None
) -> tuple[Any, Any]:
    """The model of a folder or Hub id, as TRL loads one, and its processing class, unless that is given.

    Raises:
        ValueError: `quantization_config` is among `args.model_init_kwargs` too.
    """
    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ValueError("quantization_config is in model_init_kwargs too: leave one out")
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    revision, trusted = options.get("revision"), options["trust_remote_code"]
    set_seed(args.seed)
    know(name, revision, trusted)
    net = create_model_from_path(name, **options)
    if processing_class is None:
        sides = {"truncation_side": "left", "padding_side": "left"}
        processing_class = AutoProcessor.from_pretrained(
            name, revision=revision, trust_remote_code=trusted, **sides
        )
    return net, processing_class


def know(name: str, revision: str | None, trusted: bool) -> None:
    """Let `AutoModelForCausalLM` load a model that names code of its own for `AutoModel` alone, as Dream does.

    Nothing happens unless that code is trusted, or where the model names some for both, or none.
    """
    if not trusted:
        return
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=True)
    named = getattr(config, "auto_map", None) or {}
    if "AutoModel" in named and "AutoModelForCausalLM" not in named:
        kind = get_class_from_dynamic_module(named["AutoModel"], name, revision=revision)
        AutoModelForCausalLM.register(type(config), kind, exist_ok=True)


def adapter_for(net: Any, adapter: Any) -> Any:
    """The adapter without its task, where that is generation and the model cannot: PEFT would look for it."""
    generates = hasattr(net, "prepare_inputs_for_generation")
    if adapter is None or generates or adapter.task_type != "CAUSAL_LM":
        return adapter
    return replace(adapter, task_type=None)


def give_generation_config(net: Any) -> None:
    """TRL reads the ends of sequence off it; a model that cannot `generate` has none."""
    if getattr(net, "generation_config", None) is None:
        net.generation_config = GenerationConfig.from_model_config(net.config)


@contextmanager
def loaded_by_us() -> Iterator[None]:
    """TRL takes a model that is loaded already for one to which `model_init_kwargs` do not apply, and says so."""
    log = logging.getLogger("trl.trainer.grpo_trainer")

    def of_others(record: logging.LogRecord) -> bool:
        return "You passed `model_init_kwargs`" not in record.getMessage()

    log.addFilter(of_others)
    try:
        yield
    finally:
        log.removeFilter(of_others)
