"""Token-level policy optimisation of language models: HAPO and its siblings, exact and engine-free.

>>> import hapo
>>> method = hapo.method("hapo", eps_low=0.2, eps_high=0.28)
>>> batch = method.prepare(batch)   # once a rollout batch
>>> out = method.loss(batch)        # on the whole batch or any slice; out.loss.backward()
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import EntropyStats, LossOutput, StepTotals, TokenBatch
    from .method import Method
    from .methods import method, methods
    from .stage import Record, Stage
    from .supervised import Supervised

__version__ = "0.1.0"

__all__ = [
    "EntropyStats",
    "LossOutput",
    "Method",
    "Record",
    "Stage",
    "StepTotals",
    "Supervised",
    "TokenBatch",
    "__version__",
    "method",
    "methods",
]

_HOMES = {
    "EntropyStats": ".batch",
    "LossOutput": ".batch",
    "Method": ".method",
    "Record": ".stage",
    "Stage": ".stage",
    "StepTotals": ".batch",
    "Supervised": ".supervised",
    "TokenBatch": ".batch",
    "method": ".methods",
    "methods": ".methods",
}
"""Public name -> the module that has it. All of them need torch, which takes seconds to import."""

_SUBMODULES = ("batch", "parts")
"""Submodules that are there after `import hapo`, imported when they are read as well."""


class _Package(ModuleType):
    """This package. It imports a public name when somebody reads it, so that `hapo --help` imports no torch."""

    def __getattr__(self, name: str) -> Any:
        """A name that was not read before; from then on it is an attribute like any other."""
        if name in _HOMES:
            value = getattr(importlib.import_module(_HOMES[name], __name__), name)
        elif name in _SUBMODULES:
            value = importlib.import_module(f".{name}", __name__)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Set it, unless it is the module `method` or `methods`: these names are the functions.

        The import system makes each submodule an attribute of its package once it is imported, and would hide the
        function of the same name.
        """
        if not (name in ("method", "methods") and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *_HOMES, *_SUBMODULES})


sys.modules[__name__].__class__ = _Package
