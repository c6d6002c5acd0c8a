"""Four networks of one shape: policy, critic, target critic and reference.

Each is a causal language model; what the critics put out as logits are Q values. A tiny model is copied whole.
With LoRA all four stand on one shared base: policy, critic and target are adapters on it, and the base is the
reference, so that four networks cost little more than one.

Shapes: R rows, C columns; N positions, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..batch import working_dtype
from ..scoring import logit_transform

Name = Literal["policy", "critic", "target", "reference"]
TRAINED: tuple[Name, ...] = ("policy", "critic", "target")
"""What a checkpoint holds: the target follows the critic, and the reference stays."""


class Networks(Protocol):
    """The four networks, and what an update does with them."""

    def use(self, name: Name) -> Any:
        """A context manager: the causal language model of this name, which takes gradients where it is trained.

        A backward pass runs inside, as a passage of the network that it goes through.
        """
        ...

    def logits(self, name: Name, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """What the output layer of a network makes of hidden states."""
        ...

    def parameters(self, name: Name) -> dict[str, nn.Parameter]:
        """The parameters that a network has of its own, by name; the same names for policy, critic and target."""
        ...

    def save_policy(self, folder: Path) -> None:
        """The policy as a model folder, or as an adapter's."""
        ...


class WholeNetworks:
    """Four whole models: three copies of the one that is given, which is the policy.

    Raises:
        ValueError: half precision, in which the steps of the target critic are rounded away.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        half = {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}
        if half:
            raise ValueError(
                f"dtype={str(half.pop()).removeprefix('torch.')} cannot be honoured: a target critic in half "
                "precision never moves; load the model in float32, or train adapters with use_peft"
            )
        self._models: dict[Name, Any] = {"policy": model}
        others: tuple[Name, ...] = ("critic", "target", "reference")
        for name in others:
            self._models[name] = copy.deepcopy(model).requires_grad_(name == "critic")

    @contextmanager
    def use(self, name: Name) -> Iterator[Any]:
        """See `Networks`."""
        yield self._models[name]

    def logits(self, name: Name, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """See `Networks`."""
        return _logits(self._models[name], hidden)

    def parameters(self, name: Name) -> dict[str, nn.Parameter]:
        """See `Networks`."""
        return dict(self._models[name].named_parameters())

    def save_policy(self, folder: Path) -> None:
        """See `Networks`."""
        self._models["policy"].save_pretrained(folder)


class SharedNetworks:
    """Three adapters of one LoRA configuration on one base, which alone is the reference.

    The adapters begin equal. The output layer is the base's: an adapter on it would be another head for each
    network.

    Raises:
        ValueError: dropout, an adapter on the output layer, or layers that are trained whole (modules_to_save).
    """

    def __init__(self, model: PreTrainedModel, config: Any) -> None:
        from peft import get_peft_model

        if getattr(config, "modules_to_save", None):
            raise ValueError(
                f"modules_to_save={config.modules_to_save} cannot be honoured: policy and critics share the base; "
                "leave it out"
            )
        if getattr(config, "lora_dropout", 0.0):
            raise ValueError(
                f"lora_dropout={config.lora_dropout} cannot be honoured: values and log-probs are those of the "
                "whole network; set it to 0"
            )
        self._model: Any = get_peft_model(model, config, adapter_name="policy")
        head = self._model.get_base_model().get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError("the output layer cannot have an adapter: leave it out of target_modules")
        first = self.parameters("policy")
        for name in TRAINED[1:]:
            self._model.add_adapter(name, config)
            with torch.no_grad():
                for key, parameter in self.parameters(name).items():
                    parameter.copy_(first[key])

    @contextmanager
    def use(self, name: Name) -> Iterator[Any]:
        """See `Networks`."""
        base = self._model.get_base_model()
        if name == "reference":
            with self._model.disable_adapter():
                yield base
        else:
            self._model.set_adapter(name, inference_mode=name == "target")
            yield base

    def logits(self, name: Name, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """See `Networks`; the output layer is the same for all."""
        return _logits(self._model.get_base_model(), hidden)

    def parameters(self, name: Name) -> dict[str, nn.Parameter]:
        """See `Networks`."""
        part = f".{name}."
        return {
            key.replace(part, "."): parameter
            for key, parameter in self._model.named_parameters()
            if part in key and "lora_" in key
        }

    def save_policy(self, folder: Path) -> None:
        """See `Networks`."""
        self._model.save_pretrained(folder, selected_adapters=["policy"])
        for file in (folder / "policy").iterdir():  # PEFT puts an adapter with a name into a folder of its own
            file.rename(folder / file.name)
        (folder / "policy").rmdir()


def hidden_states(
    network: Any, ids: Int[Tensor, "R C"], attention: Int[Tensor, "R C"], at: Int[Tensor, "2 N"]
) -> Float[Tensor, "N D"]:
    """What enters a network's output layer at some positions, row and column each."""
    out = network.base_model(input_ids=ids, attention_mask=attention, use_cache=False)
    return out.last_hidden_state[at[0], at[1]]


def _logits(network: Any, hidden: Tensor) -> Tensor:
    scale, softcap = logit_transform(network.config.get_text_config())
    logits = network.get_output_embeddings()(hidden)
    logits = scale * logits.to(working_dtype(logits))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def follow(target: dict[str, nn.Parameter], critic: dict[str, nn.Parameter], polyak: float) -> None:
    """theta_t <- polyak theta_t + (1 - polyak) theta, in place."""
    with torch.no_grad():
        for name, slow in target.items():
            slow.lerp_(critic[name].to(slow.dtype), 1 - polyak)


def save_networks(networks: Networks, folder: Path) -> None:
    """Write the parameters of policy, critic and target as safetensors, a file each."""
    for name in TRAINED:
        tensors = {key: x.detach().cpu().contiguous().clone() for key, x in networks.parameters(name).items()}
        save_file(tensors, folder / f"{name}.safetensors")


def load_networks(networks: Networks, folder: Path) -> None:
    """Read what `save_networks` wrote.

    Raises:
        ValueError: it is of a model of another form.
    """
    for name in TRAINED:
        found, own = load_file(folder / f"{name}.safetensors"), networks.parameters(name)
        if {k: x.shape for k, x in found.items()} != {k: x.shape for k, x in own.items()}:
            raise ValueError(
                f"{folder / f'{name}.safetensors'} is of another model or adapter; resume with the same"
            )
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(found[key])
