"""Named methods, one file a paper: only compositions of parts, with their defaults and citations.

A file of this folder that registers a class of options is a method; its name begins with no underscore.
"""

import importlib
import pkgutil

from ._options import ClippedOptions, GroupOptions, Options, Paper, SupervisedOptions, TemperatureOptions
from ._registry import method, methods, options_of, policy, register, supervised

__all__ = [
    "ClippedOptions",
    "GroupOptions",
    "Options",
    "Paper",
    "SupervisedOptions",
    "TemperatureOptions",
    "method",
    "methods",
    "options_of",
    "policy",
    "register",
    "supervised",
]

for _file in pkgutil.iter_modules(__path__):
    if not _file.name.startswith("_"):
        importlib.import_module(f".{_file.name}", __name__)
