"""The options of a model on the command line: TRL's, and those of a GateRA adapter."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from trl import ModelConfig, get_peft_config

from . import nearest

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass
class AdaptedModelConfig(ModelConfig):
    """TRL's `ModelConfig`, with the options of a GateRA adapter.

    Raises:
        ValueError: `gatera` is no mapping, names an option that GateRAConfig has not, or a value out of its range;
            an option of LoRA beside it.
    """

    gatera: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "train a GateRA adapter: options of hapo.adapters.GateRAConfig, a mapping, on the command "
            'line as JSON, e.g. {"r": 8}; {} takes its defaults'
        },
    )

    def __post_init__(self) -> None:
        """TRL's checks, then ours."""
        super().__post_init__()
        if isinstance(self.gatera, str):
            try:
                self.gatera = json.loads(self.gatera)
            except ValueError as error:
                raise ValueError(f"gatera is no JSON: {self.gatera!r} ({error})") from error
        if not isinstance(self.gatera, dict | None):
            raise ValueError(f"gatera must be a mapping of options, got {self.gatera!r}; {{}} takes the defaults")
        if self.gatera is not None:
            self._check_alone()
            self.use_peft = True
            self.adapter()

    def adapter(self) -> PeftConfig | None:
        """The config of the adapter to train; None to train all weights.

        Raises:
            ValueError: as above.
            ImportError: PEFT is not installed, or of another release than the one tested.
        """
        if self.gatera is None:
            return get_peft_config(self)
        try:
            from ..adapters import GateRAConfig
        except ModuleNotFoundError as error:
            raise ImportError(f"gatera needs PEFT ({error}); pip install 'hapo[peft]'") from error
        assert isinstance(self.gatera, dict)
        known = [f.name for f in fields(GateRAConfig) if f.init]
        for name in self.gatera:
            if name not in known:
                raise ValueError(f"gatera: GateRAConfig has no option {name!r}{nearest(name, known)}")
        return GateRAConfig(**{"task_type": "CAUSAL_LM", **self.gatera})

    @property
    def gate_loss(self) -> bool:
        """Whether the entropy of gates belongs in the loss."""
        return self.gatera is not None and self.adapter().entropy_weight > 0  # type: ignore[union-attr]

    def _check_alone(self) -> None:
        for f in fields(ModelConfig):
            of_lora = f.name.startswith("lora_") or f.name in ("use_dora", "use_rslora")
            if of_lora and getattr(self, f.name) != f.default:
                raise ValueError(
                    f"{f.name}={getattr(self, f.name)!r} is LoRA's, and gatera names another adapter: put its "
                    "rank, branch and modules into gatera, or leave gatera out"
                )
