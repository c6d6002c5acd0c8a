"""GateRA as PEFT drives it, and its entry in PEFT's tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import get_pattern_key
from torch import nn

from .config import GateRAConfig, GateRAType
from .layer import UNMERGEABLE, GatedLinear

TESTED = "0.21"
"""The release of PEFT that this was tested with: what is overridden here moves between releases."""

PAPERS_MODULES = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


class GateRAModel(BaseTuner):
    """A model with gated layers; PEFT makes it from a `GateRAConfig`."""

    prefix: str = "gatera_"
    tuner_layer_cls = GatedLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's name; see _prepare_adapter_config)

    def _prepare_adapter_config(self, peft_config: GateRAConfig, model_config: dict[str, Any]) -> GateRAConfig:
        if peft_config.target_modules is None:
            present = {name.rpartition(".")[2] for name, _ in self.model.named_modules()}
            if missing := [name for name in PAPERS_MODULES if name not in present]:
                raise ValueError(
                    f"GateRA adapts {', '.join(PAPERS_MODULES)} by default, and {type(self.model).__name__} has "
                    f"no {', '.join(missing)}: name its layers in target_modules"
                )
            peft_config.target_modules = set(PAPERS_MODULES)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: GateRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        key = get_pattern_key(peft_config.rank_pattern.keys(), current_key)
        r = peft_config.rank_pattern.get(key, peft_config.r)
        if isinstance(target, GatedLinear):
            target.update_layer(adapter_name, r, peft_config)
            return
        layer = GatedLinear(target, adapter_name, peft_config, r)
        if adapter_name not in self.active_adapters:  # a further adapter is trained once it is active
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:  # PEFT drops it where a model does not take it up here
            raise ValueError("GateRA has the same adapters on all rows of a batch: set_adapter, not adapter_names")
        yield

    def _check_merge_allowed(self) -> NoReturn:
        raise ValueError(UNMERGEABLE)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: the update depends on the token."""
        return False


def register() -> None:
    """Enter GateRA in PEFT's tables. `peft.utils.register_peft_method` takes names of PEFT's own only.

    Raises:
        ImportError: PEFT is of another release than the one tested.
    """
    if peft.__version__.split(".")[:2] != TESTED.split("."):
        raise ImportError(
            f"hapo.adapters was tested with peft {TESTED} and refuses {peft.__version__}; install it with: "
            f'pip install "peft=={TESTED}.*"'
        )
    kind: Any = GateRAType.GATERA
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = GateRAConfig
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = GateRAModel
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = GateRAModel.prefix


register()
