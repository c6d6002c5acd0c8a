"""Optimistic Adagrad (OAdagrad)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimistic import Optimistic, State, real, wide


class OptimisticAdagrad(Optimistic):
    """Optimistic Adagrad (OAdagrad; arXiv 1912.11940, Alg. 2): OSG in the metric of Adagrad.

        z_k = x_{k-1} - lr g_{k-1} / H_{k-1}     H_0 = delta, z_0 = x_0
        g_k = T(z_k)                             the only gradient
        x_k = x_{k-1} - lr g_k / H_{k-1}
        H_k = delta + sqrt(sum_j g_j^2)          j = 0..k, in each coordinate

    Two states per parameter: x and the sum of squares; with lag 1 the last gradient in the place of x, which is
    then taken back from z. The method is unconstrained: there is no projection.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: eta, at least 0. The theory wants lr <= delta / (9 L) for an L-Lipschitz field. A schedule counts for
            both lines of the step in which it is read.
        delta: above 0; outside the root. The theory wants a bound of the gradients' absolute values. Far below
            them the first step is lr g_0 / delta, without any measure.
        lag: 0: H_k has the gradients up to g_k; 1: up to g_{k-1}. The paper's text could not settle which.
        include_g0: whether g_0 is in the sum.
        weight_decay: adds weight_decay z to the gradient, as in `torch.optim.Adagrad`: it is part of g_k, in the
            sum too. At least 0.
        maximize: go up the gradient; of the groups of a player who maximises the common function.
        foreach: take several parameters at once; None as in torch: on accelerators.
        differentiable, capturable, fused: refused.

    Raises:
        ValueError: a value out of its range, an option that cannot be honoured, a sparse gradient, lag 1 with
            parameters in half precision.
    """

    refused: ClassVar = {"projection": "the method is unconstrained; OptimisticSGD takes a projection"}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        delta: float = 1.0,
        lag: int = 0,
        include_g0: bool = True,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
    ) -> None:
        shared = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "foreach": foreach}
        own = {"delta": delta, "lag": lag, "include_g0": include_g0}
        super().__init__(params, shared | own, differentiable=differentiable, capturable=capturable, fused=fused)

    def check(self, group: dict[str, Any]) -> None:
        """Raise a ValueError, unless the options of a group can be honoured."""
        super().check(group)
        if not 0 < group["delta"] < math.inf:
            raise ValueError(
                f"delta must be above 0 and finite, got {group['delta']!r}: take a bound of the "
                "gradients' absolute values, 1.0 for instance"
            )
        if group["lag"] not in (0, 1):
            raise ValueError(f"lag must be 0 or 1, got {group['lag']!r}")

    def begin(self, p: Tensor, state: State, group: dict[str, Any]) -> None:
        """x_0 = z_0, and a sum of 0."""
        x = p.detach().to(wide(p.dtype), copy=True)
        state["sum"] = torch.zeros_like(real(x))
        if not group["lag"]:
            state["x"] = x
            return
        if p.dtype != x.dtype:
            raise ValueError(
                f"lag=1 takes x back from the parameter, which {p.dtype} rounds: take lag=0, or keep the weights "
                "in float32"
            )
        state["grad"], state["lr"] = torch.zeros_like(x), 0.0

    def advance(self, ps: list[Tensor], gradients: list[Tensor], states: list[State], group: State) -> None:
        """x_k where there was a step before, the sum, and z_{k+1}."""
        lr, k, gradients = float(group["lr"]), states[0]["step"], [real(g) for g in gradients]
        zs, sums = [real(p) for p in ps], [state["sum"] for state in states]
        if group["lag"]:
            # The sum is one gradient behind and wants the last one; z is moved back to x, and on.
            last = [real(state["grad"]) for state in states]
            xs, added, counted = zs, last, k > 1 or (k and group["include_g0"])
        else:
            xs, added, counted = [real(state["x"]) for state in states], gradients, k or group["include_g0"]
        h = self._metrics(states, group)
        if k:
            if group["lag"]:
                torch._foreach_addcdiv_(xs, last, h, [state["lr"] for state in states])
            torch._foreach_addcdiv_(xs, gradients, h, -lr)
        if counted:
            torch._foreach_addcmul_(sums, added, added)
            if k:  # z_1 is made with H_0, which has no gradient
                self._metrics(states, group, h)
        if zs[0].dtype == xs[0].dtype:
            torch._foreach_copy_(zs, xs)
            torch._foreach_addcdiv_(zs, gradients, h, -lr)
        else:
            torch._foreach_copy_(zs, torch._foreach_addcdiv(xs, gradients, h, -lr))
        if group["lag"]:
            torch._foreach_copy_(last, gradients)
            for state in states:
                state["lr"] = lr

    @staticmethod
    def _metrics(states: list[State], group: State, into: list[Tensor] | None = None) -> list[Tensor]:
        """H of each parameter from its sum, into these tensors or new ones.

        The sum of g_0 is no part of H_0 = delta, with which both z_1 and x_1 are made.
        """
        sums = [state["sum"] for state in states]
        if into is None:
            if states[0]["step"] <= 1:
                return [torch.full_like(s, group["delta"]) for s in sums]
            into = list(torch._foreach_sqrt(sums))
        else:  # memory as large as the parameters is dear to get anew
            torch._foreach_copy_(into, sums)
            torch._foreach_sqrt_(into)
        torch._foreach_add_(into, group["delta"])
        return into

    @torch.no_grad()
    def metric(self, p: Tensor) -> Tensor:
        """A copy of H_k, by which the next gradient will be divided; delta before the first step.

        Of a complex parameter it has a last axis of 2, real and imaginary part.
        """
        (group,) = (group for group in self.param_groups if any(p is one for one in group["params"]))
        if p in self.state:
            return self._metrics([self.state[p]], group)[0]
        return torch.full_like(real(p.detach().to(wide(p.dtype))), group["delta"])

    @torch.no_grad()
    def x(self, p: Tensor) -> Tensor:
        """A copy of the sequence x beside the parameter `p`, which is z itself; equal before the first step."""
        if p not in self.state or "x" in self.state[p]:
            return super().x(p)
        x, state = p.detach().clone(), self.state[p]
        real(x).addcdiv_(real(state["grad"]), self.metric(p), value=state["lr"])
        return x
