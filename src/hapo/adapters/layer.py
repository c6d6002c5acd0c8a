"""A linear layer with gated branches, one for each adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import GateRAConfig

UNMERGEABLE = (
    "a GateRA adapter cannot be merged into the weights: its gate makes the weight depend on the token. Keep it "
    "beside the base model, in training, scoring and generation alike"
)


class GatedLinear(nn.Module, BaseTunerLayer):
    """y = W0 x + bias + sum over active adapters of g(x) branch(x): see `GateRAConfig`.

    Args:
        base_layer: a `torch.nn.Linear` or GPT-2's `Conv1D`, not quantised.
        adapter_name, config, r: of the first adapter.

    Raises:
        ValueError: the base layer is of another kind, or quantised.
    """

    adapter_layer_names: tuple[str, ...] = ("gatera_A", "gatera_B", "gatera_magnitude", "gatera_gate")
    other_param_names: tuple[str, ...] = ("r", "branch", "scale", "gatera_dropout")

    # PEFT's, which mypy does not read.
    active_adapters: list[str]
    disable_adapters: bool
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[[list[str]], None]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: GateRAConfig, r: int) -> None:
        super().__init__()
        _check(base_layer)
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.branch: dict[str, str] = {}
        self.scale: dict[str, float] = {}
        self.gatera_dropout = nn.ModuleDict()
        self.gatera_A = nn.ParameterDict()
        self.gatera_B = nn.ParameterDict()
        self.gatera_magnitude = nn.ParameterDict()
        self.gatera_gate = nn.ModuleDict()
        self.merged_adapters: list[str] = []  # PEFT asks for it; always empty
        self.record: Callable[[GatedLinear, str, Tensor], None] | None = None
        """Told the adapter and the logits of its gate, while somebody records them (`record_gates`)."""
        self.out_features, self.in_features = self._weight().shape
        self._active_adapter = [adapter_name]
        self.update_layer(adapter_name, r, config)

    def update_layer(self, adapter_name: str, r: int, config: GateRAConfig, **_: Any) -> None:
        """Add an adapter of rank r."""
        weight = self._weight()
        self.r[adapter_name], self.branch[adapter_name] = r, config.branch
        self.scale[adapter_name] = config.scale(r)
        self.gatera_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        a = torch.empty(r, self.in_features, device=weight.device)
        b = torch.zeros(self.out_features, r, device=weight.device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if not config.init_weights:
            nn.init.normal_(b, std=1 / r)
        self.gatera_A[adapter_name], self.gatera_B[adapter_name] = nn.Parameter(a), nn.Parameter(b)
        gate = nn.Linear(self.in_features, 1, device=weight.device)
        nn.init.normal_(gate.weight, std=config.gate_std)
        nn.init.zeros_(gate.bias)
        self.gatera_gate[adapter_name] = gate
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.branch == "dora":  # after the move, which would round it to the dtype of W0
            norms = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).norm(dim=1)
            self.gatera_magnitude[adapter_name] = nn.Parameter(norms)
        self.set_adapter(self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Of inputs (..., d_in), outputs (..., d_out) in the base layer's dtype."""
        base = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return base
        result = base
        for name in self.active_adapters:
            if name in self.gatera_A:
                result = result + self._gated(name, x, base)
        return result.to(base.dtype)

    def _gated(self, name: str, x: Tensor, base: Tensor) -> Tensor:
        a, b = self.gatera_A[name], self.gatera_B[name]
        x = self._cast_input_dtype(x, a.dtype)
        z = self._gate_logits(name, x)
        if self.record is not None:
            self.record(self, name, z)
        gate = torch.sigmoid(z).to(a.dtype).unsqueeze(-1)
        dropped = self.gatera_dropout[name](x)
        if self.branch[name] == "hira":
            return gated_linear(dropped, self._weight() * (b @ a), gate)
        low = F.linear(dropped, a)
        if self.branch[name] == "lora":
            return F.linear(gate * (self.scale[name] * low), b)
        if dropped is x:
            bias = self.get_base_layer().bias
            plain = base if bias is None else base - bias
        else:
            plain = F.linear(dropped, self._weight().to(dropped.dtype))
        ratio = self.gatera_magnitude[name] / self._row_norms(name)
        return gate * (ratio * (plain + self.scale[name] * F.linear(low, b)) - plain)

    def _gate_logits(self, name: str, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n"]:
        """z = W_g x + b_g, in float32 at least: under autocast too, as a gate of 8 bits would move in steps."""
        gate: Any = self.gatera_gate[name]
        dtype = torch.promote_types(gate.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), gate.weight.to(dtype), gate.bias.to(dtype)).squeeze(-1)

    @torch.no_grad()
    def _row_norms(self, name: str) -> Float[Tensor, " o"]:
        """||W0 + s P|| of each output, detached, in float32 at least."""
        weight = self._weight()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            update = self.gatera_B[name].to(dtype) @ self.gatera_A[name].to(dtype)
            return (weight.to(dtype) + self.scale[name] * update).norm(dim=1)

    def _weight(self) -> Float[Tensor, "o i"]:
        """W0; Conv1D keeps its transpose."""
        base = self.get_base_layer()
        return base.weight.t() if isinstance(base, Conv1D) else base.weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refused.

        Raises:
            ValueError: always, with the reason.
        """
        raise ValueError(UNMERGEABLE)

    def unmerge(self) -> None:
        """Nothing: no adapter is ever merged."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> NoReturn:
        """Refused; the model's method of this name says False.

        Raises:
            TypeError: always, with the reason, where PEFT would convert the adapter.
        """
        raise TypeError(f"a GateRA adapter cannot be converted to LoRA: {UNMERGEABLE}")


def gated_linear(
    x: Float[Tensor, "*n i"], weight: Float[Tensor, "o i"], gate: Float[Tensor, "*n 1"]
) -> Float[Tensor, "*n o"]:
    """gate * (weight x). Its backward keeps x, weight and gate, and not the product, as plain autograd would.

    That is d_out numbers per token and layer, a tenth of what a step holds. Differentiable as often as one likes.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, gate = x.to(dtype), weight.to(dtype), gate.to(dtype)
    return _GatedProduct.apply(x, weight, gate)


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, gate)
        return F.linear(x, weight).mul_(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight, gate = ctx.saved_tensors
        to_x, to_weight, to_gate = ctx.needs_input_grad
        back = grad @ weight if to_x or to_gate else None
        grad_gate = None if back is None or not to_gate else (back * x).sum(-1, keepdim=True)
        grad_x = None if back is None or not to_x else gate * back
        rows, columns = weight.shape
        grad_weight = (gate * grad).reshape(-1, rows).t() @ x.reshape(-1, columns) if to_weight else None
        return grad_x, grad_weight, grad_gate


def _check(layer: nn.Module) -> None:
    if isinstance(layer, BaseTunerLayer):
        raise ValueError("a GateRA layer cannot wrap a layer of another adapter type")
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, nn.Linear | Conv1D):
        raise ValueError(
            f"GateRA adapts linear layers, not {type(layer).__name__} (quantised layers and embeddings are not "
            "among them): change target_modules, or load the model without quantisation"
        )
    quantised = type(weight).__module__.partition(".")[0] in ("torchao", "bitsandbytes")
    if weight is None or quantised or not weight.is_floating_point():
        raise ValueError(
            f"GateRA does not adapt quantised layers ({type(layer).__module__}.{type(layer).__name__}): load the "
            "model without quantisation"
        )
