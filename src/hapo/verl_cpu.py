"""As `hapo.verl`, on CPUs, for smoke runs and tests: `VERL_USE_EXTERNAL_MODULES=hapo.verl_cpu`."""

from .engines.verl_cpu import platform  # isort: skip - must be known before verl's engines are imported
from .engines import verl
from .engines.verl_cpu import rollout

__all__ = ["platform", "rollout", "verl"]
