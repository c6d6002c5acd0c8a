"""HAPO and its siblings in verl: importing this module registers them. `VERL_USE_EXTERNAL_MODULES=hapo.verl`."""

from .engines import verl

__all__ = ["verl"]
