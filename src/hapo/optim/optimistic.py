"""What the optimistic optimisers share: options, gradients, the state of each parameter, and its saving.

A parameter tensor holds z, the point that looks ahead: the gradient is taken there, and z is what is evaluated and
saved, because the guarantees are for z. The sequence x is kept beside it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, _default_to_fused_or_foreach

NOT_OURS = {
    "differentiable": "a step is taken in place, without a graph; leave it out",
    "capturable": "the first steps take another path than the others, and the host chooses it; leave it out",
    "fused": "there is no fused kernel; leave it out, or set foreach=True",
    "momentum": "neither method has momentum; leave it out",
    "betas": "neither method has running means; leave it out",
    "eps": "delta of OptimisticAdagrad is the only constant in a denominator",
    "lr_decay": "take a scheduler of torch.optim.lr_scheduler",
    "initial_accumulator_value": "the sum of squares begins at 0; delta bounds the step",
}
"""Options of other optimisers -> why they are refused, and what to do. Among the keys of a parameter group too."""

State = dict[str, Any]


class Optimistic(Optimizer):
    """Base of `OptimisticSGD` and `OptimisticAdagrad`.

    A subclass says what a step is, in `begin` and `advance`. Parameters without a gradient are skipped and
    keep their state; each counts its own steps, so that one may come in later.
    """

    refused: ClassVar[dict[str, str]] = {}
    """Further options of groups that the method has not -> why, and what to do."""

    # -- options ----------------------------------------------------------------------------------------------

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **refused: Any) -> None:
        """Check the options of all groups, and those of torch's optimisers that neither method has."""
        self.check({**defaults, **refused})
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.

        Raises:
            ValueError: an option out of its range, or one that cannot be honoured; the message has the value.
        """
        self.check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def check(self, group: dict[str, Any]) -> None:
        """Raise a ValueError, unless the options of a group can be honoured."""
        for name, reason in (NOT_OURS | self.refused).items():
            if group.get(name):
                raise ValueError(f"{name}={group[name]!r} cannot be honoured by {type(self).__name__}: {reason}")
        for name in ("lr", "weight_decay"):
            if not 0 <= float(group[name]) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {group[name]!r}")

    # -- a step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the gradients at z, which the parameters hold, and move them on to the next z.

        N + 1 calls are N steps of the method: the first one only looks ahead. Each needs one gradient.

        Args:
            closure: clears the gradients, computes the loss and its gradients, and returns the loss; called once.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # What goes through the same operations: foreach takes it at once, else one parameter after the other.
            alike: dict[tuple[Any, ...], list[tuple[Tensor, Tensor, State]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    gradient, state = self.gradient(p, group), self.state[p]
                    if not state:
                        self.begin(p, state, group)
                        state["step"] = 0
                    alike[min(state["step"], 2), p.device, p.dtype].append((p, gradient, state))
            foreach = group["foreach"]
            if foreach is None:
                _, foreach = _default_to_fused_or_foreach(group["params"], differentiable=False)
            for found in alike.values():
                for some in [found] if foreach else [[one] for one in found]:
                    ps, gradients, states = (list(column) for column in zip(*some, strict=True))
                    self.advance(ps, gradients, states, group)
                    for state in states:
                        state["step"] += 1
        return loss

    @abstractmethod
    def begin(self, p: Tensor, state: State, group: dict[str, Any]) -> None:
        """Make the state of a parameter before its first step."""

    @abstractmethod
    def advance(self, ps: list[Tensor], gradients: list[Tensor], states: list[State], group: State) -> None:
        """One step of parameters of one type and device; before it `state["step"]` were taken, or 2 and more."""

    @staticmethod
    def gradient(p: Tensor, group: dict[str, Any]) -> Tensor:
        """The field T at z: the gradient of the player's own loss, in float32 at least."""
        gradient = p.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise ValueError(
                f"a gradient of shape {tuple(p.shape)} is sparse (layout {gradient.layout}), and the sequence x "
                "moves everywhere: make it dense, as with nn.Embedding(sparse=False)"
            )
        gradient = gradient.to(wide(p.dtype))
        if group["maximize"]:
            gradient = -gradient
        if group["weight_decay"]:
            gradient = gradient.add(p.to(gradient.dtype), alpha=group["weight_decay"])
        return gradient

    # -- reading ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def x(self, p: Tensor) -> Tensor:
        """A copy of the sequence x beside the parameter `p`, which is z itself; equal before the first step."""
        return self.state[p]["x"].clone() if p in self.state else p.detach().clone()

    # -- saving -----------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but bit for bit: torch would round states in float32 to the type of the parameter."""
        super().load_state_dict(state_dict)
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, p in zip(numbers, params, strict=True):
            if number in state_dict["state"]:
                self.state[p] = {
                    name: value.to(p.device, copy=True) if isinstance(value, Tensor) else value
                    for name, value in state_dict["state"][number].items()
                }


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which a parameter of this type is stepped: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def real(x: Tensor) -> Tensor:
    """A complex tensor as its real and imaginary parts, which are coordinates of their own; others as they are."""
    return torch.view_as_real(x) if x.is_complex() else x
