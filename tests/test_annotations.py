"""The shapes in annotations are what is checked: each of them must mean something."""

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import hapo
from hapo.batch import masked
from tests.conftest import TENSOR_CODE


def modules() -> Iterator[ModuleType]:
    for name in TENSOR_CODE:
        module = importlib.import_module(name)
        yield module
        for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
            if found.name not in ("vllm", "sglang"):  # these import their engines
                yield importlib.import_module(f"{name}.{found.name}")


def annotated(module: ModuleType) -> Iterator[object]:
    """Its functions and classes, and the methods of these."""
    for thing in vars(module).values():
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(thing):
            yield thing
            # The __init__ that a dataclass makes has the annotations of its base's fields, but not its names.
            yield from (m for name, m in vars(thing).items() if inspect.isfunction(m) and name != "__init__")
        elif inspect.isfunction(thing):
            yield thing


@pytest.mark.parametrize("module", [*modules()], ids=lambda module: module.__name__)
def test_every_annotation_resolves(module):
    """A shape that lost its quotes is a name that nobody defined: nothing would be checked."""
    for thing in annotated(module):
        typing.get_type_hints(inspect.unwrap(thing), include_extras=True)


def test_a_tensor_with_more_rows_than_its_mask_is_refused():
    with pytest.raises(Exception, match="masked"):
        masked(torch.ones(7, 3), torch.ones(2, 3, dtype=torch.bool))
    assert masked(torch.ones(2, 1).expand(2, 3), torch.ones(2, 3, dtype=torch.bool)).shape == (2, 3)
    assert hapo.TokenBatch is not None
