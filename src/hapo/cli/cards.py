"""What `hapo methods` prints of each method, taken from its class of options; kept in the user's cache.

The classes need torch, which takes seconds to import; a list of names should not. So the cards are remembered,
for as long as the version and the sources that they are made of are the same.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hapo

from ..outputs import remembered

if TYPE_CHECKING:
    from ..methods._options import MethodOptions

PACKAGE = Path(hapo.__file__).parent
SOURCES = ("batch.py", "stage.py", "method.py", "supervised.py", "methods/*.py", "parts/*.py", "cli/cards.py")
"""The files of the package that a card depends on."""

REFERENCE = {"policy": "grpo", "supervised": "sft"}
"""Kind of method -> the one that the others of its kind are told apart from."""


@dataclass(frozen=True)
class Card:
    """A method in words."""

    name: str
    kind: str
    """"policy" or "supervised"."""
    summary: str
    title: str
    """Of its paper."""
    year: int
    arxiv: str
    breaks: list[str]
    """Laws that it breaks by its definition."""
    stages: dict[str, str]
    """The part that is each of its stages, with its options; "none" where the reference has one and it has not."""
    differs: list[str]
    """Stages in which it differs from the reference of its kind: GRPO, or SFT."""
    own: list[str]
    """The options that set it apart."""
    options: dict[str, list[str]]
    """Option -> its default and its meaning; the method's own first."""


@dataclass(frozen=True)
class Cards:
    """All methods, and what they share."""

    methods: dict[str, Card]
    rule: dict[str, list[str]]
    """Key of the option `temperature` -> its default and its meaning."""


def cards() -> Cards:
    """The cards, from the cache if it is there and of these very sources; otherwise made, and put there."""
    try:
        key = _key()
    except OSError:  # no sources, as in a zip file
        return make_cards()
    kept = json.loads(remembered("methods.json", key, lambda: json.dumps(asdict(make_cards()))))
    return Cards({name: Card(**card) for name, card in kept["methods"].items()}, kept["rule"])


def _key() -> str:
    digest = hashlib.sha256(hapo.__version__.encode())
    for file in sorted(file for pattern in SOURCES for file in PACKAGE.glob(pattern)):
        digest.update(f"\0{file.relative_to(PACKAGE)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def make_cards() -> Cards:
    """The cards, from the classes."""
    from ..methods import TemperatureOptions

    rule_docs = option_docs(TemperatureOptions)
    rule = {f.name: [_text(f.default), rule_docs[f.name]] for f in fields(TemperatureOptions)}
    return Cards({name: make_card(name) for name in hapo.methods()}, rule)


def make_card(name: str) -> Card:
    """The card of one method.

    Raises:
        ValueError: unknown method; the message has the nearest name.
    """
    from ..methods import options_of

    cls = options_of(name)
    differs, values, docs = differences(name), defaults(cls), option_docs(cls)
    return Card(
        name=name,
        kind=cls.kind,
        summary=cls.summary,
        title=cls.paper.title,
        year=cls.paper.year,
        arxiv=cls.paper.arxiv,
        breaks=sorted(hapo.method(name).breaks),
        stages={**hapo.method(name).stages, **differs},
        differs=list(differs),
        own=[f"{option}={_text(value)}" for option, value in _own(values).items()],
        options={option: [_text(value), docs[option]] for option, value in values.items()},
    )


def option_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass and its bases, by name of the field."""
    docs: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if "__dataclass_fields__" in vars(c)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                docs[statement.target.id] = " ".join(str(below.value.value).split())
    return docs


def differences(name: str) -> dict[str, str]:
    """The stages in which a method differs from the reference of its kind, with its choice: "none" where it has
    none and the reference has one."""
    base, own = hapo.method(REFERENCE[hapo.methods()[name]]).stages, hapo.method(name).stages
    stages = {**own, **{stage: "none" for stage in base if stage not in own}}
    return {stage: choice for stage, choice in stages.items() if choice != base.get(stage)}


def defaults(cls: type[MethodOptions]) -> dict[str, Any]:
    """The options of a method with their defaults: first those that set it apart, then the shared ones."""
    built = cls()
    values = {f.name: getattr(built, f.name) for f in fields(cls)}
    return {**_own(values), **values}


def _own(values: dict[str, Any]) -> dict[str, Any]:
    """Without the options of every method, or of every clipped one, that stand at their common default."""
    from ..methods import ClippedOptions, GroupOptions

    shared = {f.name: f.default for f in (*fields(GroupOptions), *fields(ClippedOptions))}
    return {name: value for name, value in values.items() if name not in shared or value != shared[name]}


def _text(value: Any) -> str:
    """A default as one writes it in Python; a temperature rule by its strength, the rest being its defaults."""
    from ..methods import TemperatureOptions

    return repr({"tau": value.tau} if isinstance(value, TemperatureOptions) else value)
