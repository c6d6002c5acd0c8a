"""The options of GateRA, as PEFT saves them beside the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from peft import PeftConfig

BRANCHES = ("hira", "lora", "dora")


class GateRAType(str, Enum):  # noqa: UP042 (PEFT's own is of this form, and reads `value`)
    """The type name in the saved config. PEFT alone does not know it, and so refuses to open the adapter."""

    GATERA = "GATERA"


@dataclass
class GateRAConfig(PeftConfig):
    """GateRA (arXiv 2511.17582): y = W0 x + bias + g(x) branch(x), g(x) = sigmoid(W_g x + b_g) per token, layer.

    With P = B A, A (r, d_in), B (d_out, r), W0 (d_out, d_in) frozen, * elementwise, s = lora_alpha / r:

        hira  branch(x) = (P * W0) x                                         the paper's form
        lora  branch(x) = s P x                                              ours, by the same rule
        dora  branch(x) = (m / ||W0 + s P||) (W0 + s P) x - W0 x             ours; norms of rows, detached

    `entropy_weight` times the mean binary entropy of the gates belongs in the loss: `HAPOTrainer` adds it, a loop
    of one's own by `record_gates`, transformers' `Trainer` after `add_gate_loss`.

    Raises:
        ValueError: a value is out of its range, named in the message.
    """

    r: int = field(default=32, metadata={"help": "Rank of the update (paper: 32)."})
    branch: str = field(default="hira", metadata={"help": "What the gate scales: the paper's HiRA, LoRA or DoRA."})
    lora_alpha: int | float | None = field(
        default=None, metadata={"help": "Scale of lora and dora, s = lora_alpha / r; None: s = 1. HiRA has none."}
    )
    dropout: int | float = field(
        default=0.0, metadata={"help": "Dropout of the branch's input; the gate reads x as it is."}
    )
    gate_std: int | float = field(
        default=0.02,
        metadata={
            "help": "Standard deviation of the gate's weights at the start; its bias is 0. With 0 all gates are "
            "1/2 until B has moved. Either way the adapter changes nothing at the start."
        },
    )
    entropy_weight: int | float = field(
        default=0.01,
        metadata={"help": "Weight of the gates' binary entropy in the loss (ours; the paper's is unknown)."},
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names or regular expression of the linear layers. None: q_proj, k_proj, v_proj, up_proj and "
            "down_proj (paper), where the model has them all."
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names or regular expression of the layers to leave out."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules that are trained and saved whole."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the layers to adapt; None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the model's list of layers, where it is an uncommon one."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Layer name or regular expression -> a rank other than r."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Start with B = 0. False draws B at random, for tests."}
    )

    def __post_init__(self) -> None:
        """Set the type, and check the ranges."""
        super().__post_init__()
        self.peft_type: Any = GateRAType.GATERA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        if isinstance(self.target_modules, str) and (self.layers_to_transform or self.layers_pattern):
            raise ValueError("layers_to_transform and layers_pattern need target_modules as a list of names")
        if self.branch not in BRANCHES:
            raise ValueError(f"branch must be one of {', '.join(BRANCHES)}, got {self.branch!r}")
        if self.branch == "hira" and self.lora_alpha is not None:
            raise ValueError(f"lora_alpha is of the branches lora and dora, got {self.lora_alpha} with hira")
        for name, value, good, range_ in (
            ("r", self.r, self.r >= 1, ">= 1"),
            ("dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)"),
            ("gate_std", self.gate_std, 0 <= self.gate_std < math.inf, ">= 0 and finite"),
            ("entropy_weight", self.entropy_weight, 0 <= self.entropy_weight < math.inf, ">= 0 and finite"),
        ):
            if not good:
                raise ValueError(f"{name} must be {range_}, got {value}")

    def scale(self, rank: int) -> float:
        """s of a layer of this rank."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / rank
