"""Optimistic Stochastic Gradient (OSG)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimistic import Optimistic, State, wide

Projection = Callable[[Tensor], Tensor]


class OptimisticSGD(Optimistic):
    """Optimistic Stochastic Gradient (OSG; arXiv 1912.11940, Alg. 1), with a projection.

        z_k = Proj(x_{k-1} - lr g_{k-1})         g_k = T(z_k), the only gradient
        x_k = Proj(x_{k-1} - lr g_k)             z_0 = x_0, without a projection

    One state per parameter: x. The theory wants lr <= 1/(9 L) for an L-Lipschitz field.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: eta, at least 0. A schedule counts for both lines of the step in which it is read.
        weight_decay: adds weight_decay z to the gradient: the field of the loss plus weight_decay/2 |z|^2, as in
            `torch.optim.SGD`. At least 0.
        projection: takes a tensor of the shape of a parameter, and gives the nearest point of a convex set, e.g.
            `lambda x: x.clamp(-1, 1)`. It is no part of a state dict; give it again before one is loaded.
        maximize: go up the gradient; of the groups of a player who maximises the common function.
        foreach: take several parameters at once; None as in torch: on accelerators.
        differentiable, capturable, fused: refused.

    Raises:
        ValueError: a value out of its range, an option that cannot be honoured, a sparse gradient.
    """

    refused: ClassVar = dict.fromkeys(
        ("delta", "lag", "include_g0"),
        "the step is the same in all coordinates; OptimisticAdagrad has a metric",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        projection: Projection | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
    ) -> None:
        shared = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "foreach": foreach}
        own = {"projection": projection}
        super().__init__(params, shared | own, differentiable=differentiable, capturable=capturable, fused=fused)

    def check(self, group: dict[str, Any]) -> None:
        """Raise a ValueError, unless the options of a group can be honoured."""
        super().check(group)
        if not (group["projection"] is None or callable(group["projection"])):
            raise ValueError(
                f"projection must take a tensor and return one, got {group['projection']!r}: "
                "lambda x: x.clamp(-1, 1), for instance"
            )

    def begin(self, p: Tensor, state: State, group: dict[str, Any]) -> None:
        """x_0 = z_0."""
        state["x"] = p.detach().to(wide(p.dtype), copy=True)

    def advance(self, ps: list[Tensor], gradients: list[Tensor], states: list[State], group: State) -> None:
        """x_k where there was a step before, and z_{k+1}."""
        xs, lr, projection = [state["x"] for state in states], float(group["lr"]), group["projection"]
        if states[0]["step"]:
            torch._foreach_add_(xs, gradients, alpha=-lr)
            if projection is not None:
                torch._foreach_copy_(xs, [projection(x) for x in xs])
        zs = list(torch._foreach_add(xs, gradients, alpha=-lr))
        torch._foreach_copy_(ps, zs if projection is None else [projection(z) for z in zs])

    def state_dict(self) -> dict[str, Any]:
        """As in torch, without the projections, which are code."""
        found = super().state_dict()
        for group in found["param_groups"]:
            group.pop("projection", None)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; the projections stay those of this optimiser."""
        projections = [group["projection"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, projection in zip(self.param_groups, projections, strict=True):
            group["projection"] = projection
