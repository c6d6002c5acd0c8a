"""Named methods, one file a paper: only compositions of parts, with their defaults and citations."""

from . import (  # noqa: F401 - importing a method registers it
    archer,
    aspo,
    ce_gppo,
    cispo,
    dapo,
    dr_grpo,
    edge_grpo,
    entropy_adv,
    forking_tokens,
    grpo,
    grpo_s,
    gspo,
    gtpo,
    hapo,
    rloo,
    sapo,
    stapo,
)
from ._options import AdaptiveTemperature, ClippedOptions, Options, Paper
from ._registry import method, methods, options_of, register

__all__ = [
    "AdaptiveTemperature",
    "ClippedOptions",
    "Options",
    "Paper",
    "method",
    "methods",
    "options_of",
    "register",
]
