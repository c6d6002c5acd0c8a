"""The names of the package: imported when they are read, and the same whatever was imported before."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hapo

FIRST = """
import pkgutil, sys, hapo
assert hapo.__version__ and {*hapo.__all__, "batch", "parts"} <= {*dir(hapo)}
assert not {"torch", "numpy", "jaxtyping"} & {*sys.modules}
assert not hasattr(hapo, "nothing")
"""

ORDERS = [
    "import hapo; assert hapo.method('dapo').name == 'dapo'",
    "from hapo import Method, TokenBatch, method, methods; method('dapo')",
    "from hapo.method import Method; import hapo; hapo.method('dapo'); assert hapo.Method is Method",
    "import hapo.method; hapo.method('dapo'); assert 'dapo' in hapo.methods()",
    "import hapo.methods; hapo.method('dapo'); assert 'dapo' in hapo.methods()",
    "from hapo.methods.dapo import DAPO; import hapo; assert 'hapo' in hapo.methods()",
    "import hapo; hapo.parts.entropy.entropy_from_logits; hapo.parts.shaping; hapo.batch.compact_blocks",
    "import hapo; hapo.batch.compact_blocks; hapo.parts.keep",
    "import hapo.parts.keep; hapo.parts.entropy; hapo.parts.shaping",
    "import hapo; assert {hapo.EntropyStats, hapo.StepTotals, hapo.LossOutput} and hapo.methods()",
]
"""Each in a fresh package, after which all public names must be what they are."""

THEN = """
import hapo
assert sorted(hapo.methods()) == hapo.methods() and hapo.method("hapo").name == "hapo"
assert hapo.Method is sys.modules["hapo.method"].Method
assert hapo.methods is sys.modules["hapo.methods"].methods
assert all(hasattr(hapo.parts, part.name) for part in pkgutil.iter_modules(hapo.parts.__path__))
assert hapo.batch is sys.modules["hapo.batch"] and hapo.parts is sys.modules["hapo.parts"]
for name in [name for name in sys.modules if name.partition(".")[0] == "hapo"]:
    del sys.modules[name]
"""


def test_the_public_names_are_there_whatever_is_imported_first_and_only_when_they_are_read():
    code = FIRST + "".join(f"{order}\n{THEN}" for order in ORDERS)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_public_name_can_be_replaced_and_an_unknown_one_is_named(monkeypatch):
    monkeypatch.setattr(hapo, "method", None)
    assert hapo.method is None
    monkeypatch.undo()
    assert hapo.method("dapo").name == "dapo"
    with pytest.raises(AttributeError, match="module 'hapo' has no attribute 'metod'"):
        hapo.metod  # noqa: B018
