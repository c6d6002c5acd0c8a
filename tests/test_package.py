"""The package: its names, imported when they are read and the same whatever was imported before, and its wheel."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

import hapo

ROOT = Path(__file__).parents[1]

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
    "import hapo; hapo.parts.entropy.entropy_from_logits; hapo.parts.shaping; hapo.batch.masked",
    "import hapo; hapo.batch.masked; hapo.parts.select",
    "import hapo.parts.select; hapo.parts.entropy; hapo.parts.shaping",
    "import hapo; assert {hapo.EntropyStats, hapo.StepTotals, hapo.LossOutput} and hapo.methods()",
]
"""Each in a fresh package, after which all public names must be what they are."""

THEN = """
import hapo
assert sorted(hapo.methods()) == [*hapo.methods()] and hapo.method("hapo").name == "hapo"
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


ALONE = """
import sys
from importlib.metadata import packages_distributions

given = {*sys.argv[1:]}
OTHERS = {name for name, homes in packages_distributions().items() if not given & {*homes}}

class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OTHERS:
            raise ModuleNotFoundError(f"refused: {name}", name=name)

sys.meta_path.insert(0, Refusal())
assert {"transformers", "scipy", "pandas"} <= OTHERS and not {"hapo", "torch", "sympy"} & OTHERS

import importlib, pkgutil, hapo
assert {hapo.method(name).name for name in hapo.methods()} == {*hapo.methods()}
for part in pkgutil.iter_modules(hapo.parts.__path__):
    importlib.import_module(f"hapo.parts.{part.name}")

import torch
from hapo.scoring import score_hidden
hidden = torch.ones(2, 3, requires_grad=True)
score_hidden(hidden, torch.eye(3), torch.tensor([0, 2])).logp.sum().backward()
assert hidden.grad.isfinite().all()
"""
"""Run with the distributions that may be imported; every other one is as if it were not installed."""


def with_requirements(*names: str) -> set[str]:
    """These distributions and what they require, by the names of their metadata."""
    found: set[str] = set()
    todo = [*names]
    while todo:
        try:
            home = distribution(todo.pop())
        except PackageNotFoundError:  # required and absent, as on a CPU the libraries of CUDA
            continue
        if home.name not in found:
            found.add(home.name)
            wanted = [Requirement(line) for line in home.requires or ()]
            todo += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def test_the_core_and_scoring_need_what_the_package_requires_and_no_more():
    allowed = with_requirements("hapo")
    assert {"torch", "numpy", "jaxtyping"} <= allowed
    run = [sys.executable, "-c", ALONE, *allowed]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_public_name_can_be_replaced_and_an_unknown_one_is_named(monkeypatch):
    monkeypatch.setattr(hapo, "method", None)
    assert hapo.method is None
    monkeypatch.undo()
    assert hapo.method("dapo").name == "dapo"
    with pytest.raises(AttributeError, match="module 'hapo' has no attribute 'metod'"):
        hapo.metod  # noqa: B018


def test_the_wheel_has_the_types_and_all_that_is_no_python():
    """Asked of the build backend itself: marker of the types, model, recipes, page templates, and no test."""
    files = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {"hapo/py.typed", "hapo/assets/demo.yaml", "hapo/assets/tiny/model.safetensors"} <= files
    tracked = {
        path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/hapo").rglob("*") if path.is_file()
    }
    assert files == {path for path in tracked if "__pycache__" not in path}
