"""The order of the library: a file imports only from rows above its own, and no imports go round in a circle.

Every import counts, also one inside a function or under TYPE_CHECKING: what a file needs later, or for its types only,
it knows of all the same. Not seen are imports by a name that is made when the code runs (those of `hapo` itself, the
commands of `hapo.cli`), and that Python imports the packages of a module before it.
"""

from __future__ import annotations

import ast
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hapo

SOURCE = Path(hapo.__file__).parent

ROWS = """
    assets outputs companions versions
    batch
    parts
    stage
    method supervised
    methods
    hapo
    kernels cache
    prompts head
    scoring
    masked
    adapters optim
    samplers
    tasks
    engines
    engines.trl engines.verl engines.verl_cpu
    trl verl verl_cpu verl_main verl_sft
    loops
    insight
    cli
"""
"""From the top. A name holds all that lies in it, but for what has a row of its own; `hapo` is the package itself, with
the names that it hands out. What stands in one row does not import each other."""

ROW = {name: row for row, line in enumerate(ROWS.split("\n")) for name in line.split()}


def name_of(file: Path) -> str:
    """Of a module, without the library's: `parts.entropy`; "hapo" is the library."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "hapo"


FILES = {name_of(file): file for file in SOURCE.rglob("*.py")}


def meant(path: list[str]) -> str:
    """The module that these names below `hapo` lead to, or to something in it."""
    if path in [[name] for name in hapo.__all__]:  # `from hapo import method` takes the function
        return "hapo"
    return next((name for name in (".".join(path), ".".join(path[:-1])) if name in FILES), "hapo")


def imports(module: str, code: str) -> set[str]:
    """The modules of the library that this code of a module imports."""
    package = FILES[module].relative_to(SOURCE.parent).parent.parts
    paths: list[list[str]] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            paths += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = [*package[: len(package) - node.level + 1]] if node.level else []
            home += node.module.split(".") if node.module else []
            paths += [[*home, alias.name] for alias in node.names]
    return {meant(path[1:]) for path in paths if path[0] == "hapo"}


GRAPH = {module: imports(module, file.read_text()) for module, file in sorted(FILES.items())}


def place_of(module: str) -> str:
    """The name in ROWS that holds a module."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    place = next((name for name in names if name in ROW), None)
    assert place, f"hapo.{module} has no row: give it one in {Path(__file__).name}"
    return place


def out_of_order(module: str, wanted: set[str]) -> list[str]:
    """What a module may not import."""
    own = place_of(module)
    return sorted(x for x in wanted if place_of(x) != own and ROW[place_of(x)] >= ROW[own])


@pytest.mark.parametrize("module", GRAPH)
def test_a_file_imports_only_from_rows_above_its_own(module):
    assert out_of_order(module, GRAPH[module]) == []


def test_no_imports_go_round_in_a_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail("each of these is imported by the next: " + ", ".join(error.args[1]))


def test_every_kind_of_import_is_seen():
    assert imports("parts.entropy", "from ..batch import masked\nimport torch, hapo.cli.train") == {
        "batch",
        "cli.train",
    }
    assert imports("engines.trl", "from . import card, HAPOTrainer") == {"engines.trl", "engines.trl.card"}
    assert imports("cli.train", "from hapo import method\nfrom hapo import methods as known, parts") == {
        "hapo",
        "parts",
    }
    assert imports("cli.train", "from .. import __version__\nfrom ..methods.dapo import DAPO") == {
        "hapo",
        "methods.dapo",
    }
    inside = "if TYPE_CHECKING:\n    from .run import Run\ndef f():\n    from ..trl import HAPOConfig"
    assert imports("insight.report", inside) == {"insight.run", "trl"}


def test_what_is_out_of_order_is_found():
    assert out_of_order("parts.entropy", {"batch", "parts.ratio", "method", "hapo"}) == ["hapo", "method"]
    assert out_of_order("engines.records", {"tasks", "engines.trl.config"}) == ["engines.trl.config"]
    assert out_of_order("engines.trl.config", {"engines.records", "engines.verl"}) == ["engines.verl"]
    assert out_of_order("method", {"batch", "parts.select", "methods._options"}) == ["methods._options"]
    with pytest.raises(AssertionError, match="hapo.nowhere has no row"):
        place_of("nowhere")


def test_no_two_classes_have_one_name():
    found = Counter(
        node.name
        for file in FILES.values()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert {name for name, n in found.items() if n > 1} == set()


EXTRAS = {"botorch", "captum", "gguf", "gpytorch", "peft", "sklearn"}
"""What only an extra brings beside the trainers."""


def test_what_only_an_extra_brings_is_imported_where_it_is_used():
    """At the top of a file it would be demanded of everyone who imports `hapo.trl`; adapters are peft's own."""
    files = [file for file in SOURCE.rglob("*.py") if file.relative_to(SOURCE).parts[0] != "adapters"]
    found = {
        f"{file.relative_to(SOURCE)}: {name}"
        for file in files
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        if name.split(".")[0] in EXTRAS
    }
    assert found == set()
