"""Shapes in annotations: every one is there, and the checks of `conftest.py` refuse what breaks it.

jaxtyping checks nothing where an annotation cannot be read, and says nothing. So it was with "B #T" once the linter
had taken the quotes off.
"""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jaxtyping
import pytest
import torch

import hapo
from hapo.batch import masked
from tests.conftest import TENSOR_CODE

SOURCE = Path(hapo.__file__).parent
SHAPED = {"Float", "Int", "Bool", "Shaped", "Num"}


def modules() -> Iterator[str]:
    """The tensor modules, without the one that only imports where vLLM is installed."""
    for name in TENSOR_CODE:
        yield name
        for found in pkgutil.iter_modules(getattr(importlib.import_module(name), "__path__", [])):
            if found.name != "vllm":
                yield f"{name}.{found.name}"


def annotated(owner: ModuleType | type, module: str) -> Iterator[tuple[str, object]]:
    """Functions and classes that are defined here, and the methods of these."""
    for name, value in vars(owner).items():
        if name == "__init__" and dataclasses.is_dataclass(owner):
            continue  # generated from the fields of the class and its bases, and these are resolved each at home
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == module:
            yield f"{owner.__name__}.{name}", value
            if inspect.isclass(value):
                yield from annotated(value, module)


@pytest.mark.parametrize("name", [*modules()])
def test_every_annotation_resolves(name):
    module = importlib.import_module(name)
    for where, thing in annotated(module, name):
        try:
            typing.get_type_hints(thing, include_extras=True)
        except Exception as error:
            pytest.fail(f"an annotation of {where} does not resolve: {error!r}")


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_every_shape_is_a_string(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in SHAPED:
            assert isinstance(node.slice, ast.Tuple), f"line {node.lineno}"
            shape = node.slice.elts[1]
            assert isinstance(shape, ast.Constant), f"line {node.lineno}"
            assert isinstance(shape.value, str), f"line {node.lineno}"


def test_rows_of_another_batch_are_refused():
    values, mask = torch.ones(7, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(jaxtyping.TypeCheckError, match="masked"):
        masked(values, mask)
    assert masked(torch.ones(2, 1), mask).shape == (2, 3)
