"""Named methods, one file a paper: only compositions of parts, with their defaults and citations."""

from . import dapo, grpo, hapo  # noqa: F401 - importing a method registers it
from ._registry import Options, Paper, method, methods, options_of

__all__ = ["Options", "Paper", "method", "methods", "options_of"]
