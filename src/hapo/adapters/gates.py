"""The gates of a forward pass: their logits, binary entropy, and how it reaches a loss.

Shapes: *n the positions of a forward pass, as its layers see them, (B, L) most often; M its gates, one of each
adapted layer and active adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .layer import GatedLinear

FAR = 1000.0
"""Beyond this logit the entropy is 0 in every dtype, and so is its slope."""


def gate_entropy(
    logits: Float[Tensor, "*n M"], mask: Bool[Tensor, "*n"], tokens: int | float | Tensor | None = None
) -> Float[Tensor, ""]:
    """Sum of H over the M gates of the valid positions / (tokens M): the share of these in a step's mean.

    With g = sigmoid(z), in nats:

        H = -g ln g - (1 - g) ln(1 - g) = softplus(-|z|) + |z| sigmoid(-|z|)       0 <= H <= ln 2
        dH/dz = -z g (1 - g)

    Nothing is detached. What stands at other positions is not read. Float32 at least.

    Args:
        logits: z.
        mask: the valid positions.
        tokens: valid positions of the whole optimiser step, on all ranks; None: of these. Shares add up to the
            step's mean. Without any the result is 0.
    """
    z = logits[mask]
    size = z.to(torch.promote_types(z.dtype, torch.float32)).abs().clamp(max=FAR)
    total = (F.softplus(-size) + size * torch.sigmoid(-size)).sum()
    count = len(z) if tokens is None else tokens
    return total / (torch.as_tensor(count, device=z.device) * logits.shape[-1]).clamp(min=1)


class Gates:
    """Logits of the gates of one forward pass; `record_gates` makes one.

    Args:
        model: whose layers are read.
    """

    def __init__(self, model: nn.Module) -> None:
        named = {layer: name for name, layer in model.named_modules() if isinstance(layer, GatedLinear)}
        self.layers = {layer: name.rpartition("base_model.model.")[2] for layer, name in named.items()}
        """Layer -> its name in the base model."""
        self.names: list[str] = []
        """Of the columns of what was taken last: the layer's, with "/adapter" where several are active."""
        self._seen: dict[tuple[GatedLinear, str], Tensor] = {}
        self.lost = False
        """Whether a layer ran without gradients where there are some around it, as in reentrant checkpointing."""
        self._grad = torch.is_grad_enabled()

    def add(self, layer: GatedLinear, adapter: str, logits: Float[Tensor, "*n"]) -> None:
        """What a layer says; called by it.

        Raises:
            RuntimeError: the layer has spoken already.
        """
        if (layer, adapter) in self._seen:
            raise RuntimeError(
                f"{self.layers[layer]} ran twice while its gates were recorded: record each forward pass by "
                "itself, and leave layers that a model uses several times out of target_modules"
            )
        self.lost |= self._grad and not torch.is_grad_enabled()
        self._seen[layer, adapter] = logits

    def take(self) -> Float[Tensor, "*n M"]:
        """Logits of the last pass, differentiable; what is recorded afterwards is of another pass.

        Raises:
            RuntimeError: no gate was read, or the layers see the tokens in different arrangements.
        """
        if not self._seen:
            raise RuntimeError("no gate was read: the model has no GateRA layer, or its adapters are disabled")
        order = list(self.layers)
        seen = sorted(self._seen.items(), key=lambda item: order.index(item[0][0]))
        shapes = sorted({tuple(x.shape) for _, x in seen})
        if len(shapes) > 1:
            raise RuntimeError(
                f"adapted layers see tokens in different arrangements, {shapes}, as the experts of a mixture do: "
                "leave these layers out of target_modules"
            )
        several = len({adapter for (_, adapter), _ in seen}) > 1
        self.names = [self.layers[layer] + (f"/{adapter}" if several else "") for (layer, adapter), _ in seen]
        self._seen = {}
        device = seen[0][1].device
        return torch.stack([x.to(device) for _, x in seen], -1)

    def entropy(self, mask: Bool[Tensor, "*n"], tokens: int | float | Tensor | None = None) -> Float[Tensor, ""]:
        """`gate_entropy` of what `take` gives.

        Raises:
            RuntimeError: as `take` and `check_gradient`.
        """
        self.check_gradient()
        logits = self.take()
        return gate_entropy(logits, mask.to(logits.device), tokens)

    def check_gradient(self) -> None:
        """Refuse a loss that would not reach the gates.

        Raises:
            RuntimeError: layers ran without gradients, and gradients are on now.
        """
        if self.lost and torch.is_grad_enabled():
            raise RuntimeError(
                "the layers ran without gradients, as in reentrant gradient checkpointing, so that the loss of "
                'the gates would have none: take activation_checkpointing_kwargs={"use_reentrant": False}, or '
                "entropy_weight=0. To look at the entropy, compute it under torch.no_grad()"
            )


@contextmanager
def record_gates(model: nn.Module) -> Iterator[Gates]:
    """Keep the logits of the gates of the forward pass inside. Leave it before `backward`.

    ```python
    with record_gates(model) as gates:
        output = model(input_ids, attention_mask=mask, labels=labels)
    loss = output.loss + 0.01 * gates.entropy(mask.bool())
    ```

    Gradient checkpointing runs the layers a second time in `backward`, when nothing is recorded any more: no token
    counts twice. Wrappers (DDP, FSDP) may be around the model.
    """
    gates = Gates(model)
    for layer in gates.layers:
        layer.record = gates.add
    try:
        yield gates
    finally:
        for layer in gates.layers:
            layer.record = None


def entropy_weight(model: Any) -> float:
    """Weight of the gates' entropy in the loss, as the config of the active adapters says it.

    Args:
        model: PEFT's, or one that loaded the adapter itself; without wrappers.

    Raises:
        ValueError: active adapters differ in it.
    """
    active = model.active_adapters
    names = active() if callable(active) else active  # transformers' own models have a method of this name
    weights = {model.peft_config[name].entropy_weight for name in names}
    if len(weights) > 1:
        raise ValueError(f"active adapters have different entropy_weight: {sorted(weights)}")
    return weights.pop() if weights else 0.0


def add_gate_loss(model: Any) -> None:
    """From now on `model(..., labels=...)` adds the weighted entropy of its gates to its loss, while it trains.

    This is the line for transformers' `Trainer`. The valid positions are those that predict a label other than
    -100, and their number is the trainer's `num_items_in_batch` where it hands one over, so that the sum over
    micro-batches and ranks is the step's mean, as that of the model's own loss is. Call it on PEFT's model, before
    any wrapper.

    Raises:
        ValueError: in the forward pass: labels are missing or not those of the tokens, (B, L), or the caller makes
            the loss itself, as TRL's `SFTTrainer` does.
    """
    forward = model.forward

    @functools.wraps(forward)
    def with_gates(*args: Any, **kwargs: Any) -> Any:
        labels, weight = kwargs.get("labels"), entropy_weight(model)
        if not weight or not (model.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        if labels is None:
            raise ValueError(
                "no labels reach the model, so that the entropy of the gates would be left out: leave out "
                "compute_loss_func and label_smoothing_factor, which take them away; hapo's trainers add it by "
                "themselves, without add_gate_loss; in a loop of your own use record_gates"
            )
        if "fused_lm_head" in kwargs:
            raise ValueError(
                "TRL's SFTTrainer makes its loss itself, so that the entropy of the gates would be left out: take "
                "hapo.trl.SupervisedTrainer, which adds it, without add_gate_loss"
            )
        with record_gates(model) as gates:
            output = forward(*args, **kwargs)
        gates.check_gradient()
        logits = gates.take()
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and the gates {tuple(logits.shape[:-1])}: labels of "
                "tokens are needed; with others, use record_gates with a mask of your own"
            )
        valid = F.pad(labels[:, 1:] != -100, (0, 1))
        loss = weight * gate_entropy(logits, valid.to(logits.device), kwargs.get("num_items_in_batch"))
        if isinstance(output, tuple):
            return (output[0] + loss, *output[1:])
        output["loss"] = output["loss"] + loss.to(output["loss"].device)
        return output

    model.forward = with_gates
