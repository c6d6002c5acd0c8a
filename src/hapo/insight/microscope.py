"""The token microscope: every recorded token of a run, in its text, coloured by what the method did to it.

`microscope` makes one section of a page: data, style and script in one piece, for a page whose policy allows no
network. The data of a rollout batch are one gzip stream, base64 in a data block: a JSON header, then arrays.
"""

from __future__ import annotations

import base64
import gzip
import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..method import Method
from ..supervised import Supervised
from .figures import labels
from .run import Run, parse_method, recompute
from .targets import method_of_targets, parse_supervised, reweigh

PAGES = Environment(loader=PackageLoader("hapo.insight"), autoescape=True, undefined=StrictUndefined)
BUDGET = 8 * 2**20
"""Characters of encoded data that a page may hold."""
SHARED = (
    *("entropy", "entropy_new", "temperature", "logp_old", "logp_new", "logp_sampler", "logp_ref", "gate"),
    *("token_reward", "logp", "rank", "expected_rank", "unmasked", "confidence"),
    *("q", "value", "target", "q_other", "other", "kl"),
)
"""Columns that are the same under every method."""
ATTRIBUTION = "attribution_"
"""How the names of further such columns begin: channels of `hapo.tasks.attribution`, or their mixture."""
TREATMENT = (
    "signal",
    "weight",
    "advantage",
    "advantage_used",
    "ratio",
    "bound_low",
    "bound_high",
    "clipped",
    "kept",
    "push",
)
"""Columns that a method makes."""


@dataclass(frozen=True)
class Encoded:
    """A rollout batch, or the first responses of it, as the page holds it."""

    rollout: int
    """First optimiser step of the rollout batch."""
    data: str
    """Base64 of a gzip stream."""
    responses: int
    """Responses in the data."""
    recorded: int
    """Responses that the run recorded."""
    complete: bool
    """Every response of the rollout batch was recorded."""


def microscope(
    runs: Sequence[Run],
    *,
    against: Sequence[str | Method | Supervised] = (),
    nonce: str,
    rollouts: Sequence[int] | None = None,
    budget: int = BUDGET,
) -> Markup:
    """The section of a page that shows the recorded tokens of some runs.

    Args:
        runs: those without token records are named as such.
        against: other methods for the same rollouts, as `parse_method` reads them, or built.
        nonce: of the page's content security policy, for the script.
        rollouts: recorded rollout batches to show, by their first optimiser step; None takes as many as fit:
            the first, the last, then again and again the one farthest from those taken.
        budget: characters of encoded data, in equal parts for every run. Of a rollout batch that is too large
            by itself the first responses are shown.

    Raises:
        ValueError: an unknown method, a rollout batch that a run did not record, or records that lack what a
            method reads.
    """
    parse = parse_supervised if runs and all(run.supervised for run in runs) else parse_method
    others = [(spec, parse(spec)) if isinstance(spec, str) else (spec.name, spec) for spec in against]
    if twice := [name for name, n in Counter(name for name, _ in others).items() if n > 1]:
        raise ValueError(f"against has two methods called {twice[0]!r}: give one of them another name")
    index, blobs, empty = [], [], []
    share = budget // max(1, sum(bool(run.rollouts) for run in runs))
    for number, (run, name) in enumerate(zip(runs, labels(runs), strict=True)):
        if not run.rollouts:
            empty.append(name)
            continue
        if any(isinstance(method, Supervised) != run.supervised for _, method in others):
            kind = "supervised" if run.supervised else "policy"
            raise ValueError(f"against: {run.folder} was trained with a {kind} method; name methods of that kind")
        if run.agent and others:
            raise ValueError(f"against: {run.folder} trained an agent with a critic, which no other method has")
        if unknown := sorted(set(rollouts or ()) - set(run.rollouts)):
            raise ValueError(f"{run.folder} recorded no rollout batch {unknown[0]}, only {run.rollouts}")
        wanted = run.rollouts if rollouts is None else sorted(set(rollouts))
        encoded = _fitting(run, [method for _, method in others], wanted, share)
        places = [f"mx-{number}-{item.rollout}" for item in encoded]
        blobs += [(place, item.data) for place, item in zip(places, encoded, strict=True)]
        index.append(
            {
                "name": name,
                "command": f"hapo report {shlex.quote(str(run.folder))} --rollouts",
                "methods": [run.config["method"], *(spec for spec, _ in others)],
                "rollouts": [{**asdict(item), "data": x} for x, item in zip(places, encoded, strict=True)],
                "left": sorted(set(run.rollouts) - {item.rollout for item in encoded}),
            }
        )
    template = PAGES.get_template("microscope.html")
    return Markup(template.render(runs=index, blobs=blobs, empty=empty, nonce=nonce))


def encode(run: Run, first: int, others: Sequence[Method | Supervised], most: int | None = None) -> Encoded:
    """A recorded rollout batch under its own method and under others; its first `most` responses if told.

    The methods see the whole rollout batch in any case.

    Raises:
        ValueError: no such rollout batch, or its records lack what a method reads.
    """
    tokens = run.tokens(first)
    if run.supervised:
        methods = [method_of_targets(run), *(method for method in others if isinstance(method, Supervised))]
        tables = [reweigh(tokens, method) for method in methods]
        complete = True
    elif run.agent:  # its records hold all that the update made of a token
        tables, complete = [tokens], True
    else:
        rollout = run.rollout(first)
        policies = [run.method(), *(method for method in others if isinstance(method, Method))]
        own, *rest = (recompute(rollout, method) for method in policies)
        tables, complete = [tokens.assign(push=own["push"]), *rest], rollout.complete
    order = np.argsort(tokens.groupby("group", sort=False).ngroup().to_numpy(), kind="stable")
    number = tokens.iloc[order].groupby(["response", "step"], sort=False).ngroup().to_numpy()
    recorded = int(number.max()) + 1
    responses = recorded if most is None else min(most, recorded)
    order = order[number < responses]
    data = _pack(tokens.iloc[order], [table.iloc[order] for table in tables])
    return Encoded(first, data, responses, recorded, complete)


def _fitting(run: Run, others: Sequence[Method | Supervised], wanted: Sequence[int], budget: int) -> list[Encoded]:
    """As many of the wanted rollout batches as the budget holds, in the order of training; at least one."""
    taken: dict[int, Encoded] = {}
    for place in _farthest_first(len(wanted)):
        item = encode(run, wanted[place], others)
        if not taken and len(item.data) > budget:
            most = max(1, int(item.responses * budget / len(item.data)))
            return [encode(run, wanted[place], others, most)]
        if sum(len(other.data) for other in taken.values()) + len(item.data) > budget:
            break
        taken[place] = item
    return [taken[place] for place in sorted(taken)]


def _farthest_first(count: int) -> list[int]:
    """0, count - 1, then always the number farthest from those before it."""
    order = [0, count - 1][: min(count, 2)]
    while len(order) < count:
        order.append(max(range(count), key=lambda i: min(abs(i - j) for j in order)))
    return order


def _pack(tokens: pd.DataFrame, treatments: Sequence[pd.DataFrame]) -> str:
    """Base64 of a gzip stream: length of the header (4 bytes), header (JSON), arrays.

    An array is [offset, kind, length]. The four bytes of its numbers stand in four planes, which packs better;
    equal arrays are kept once.
    """
    arrays = _Arrays()
    word = tokens.groupby(["id", "text"], sort=False).ngroup()
    words = tokens.drop_duplicates(["id", "text"])
    prompt = tokens.groupby(["group", "prompt"], sort=False).ngroup().rename("place")
    responses = []
    starts = np.flatnonzero(~tokens.duplicated(["response", "step"]).to_numpy())
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        head = tokens.iloc[start]
        responses.append(
            {
                "response": int(head["response"]),
                "step": int(head["step"]),
                "group": int(prompt.iloc[start]),
                **{
                    name: None if pd.isna(value := head.get(name, np.nan)) else float(value)
                    for name in ("reward", "verdict")
                },
                "start": int(start),
                "end": int(end),
            }
        )
    said = tokens["said"].tolist() if "said" in tokens else []
    others = tokens.drop_duplicates("other") if "other" in tokens else tokens[:0]
    header: dict[str, Any] = {
        "prompts": tokens.drop_duplicates(["group", "prompt"])["prompt"].tolist(),
        "responses": responses,
        "words": list(zip(words["id"].tolist(), words["text"].tolist(), strict=True)),
        "said": {place: text for place, text in enumerate(said) if isinstance(text, str)},
        "others": {int(row.other): row.other_text for row in others.itertuples()},
        "word": arrays.add(word),
        "position": arrays.add(tokens["position"]),
        "shared": {name: arrays.add(tokens[name]) for name in _shared(tokens)},
        "methods": [
            {name: arrays.add(table[name]) for name in TREATMENT if name in table} for table in treatments
        ],
    }
    text = json.dumps(header).encode()
    stream = len(text).to_bytes(4, "little") + text + b"".join(arrays.parts)
    return base64.b64encode(gzip.compress(stream, compresslevel=6, mtime=0)).decode()


def _shared(tokens: pd.DataFrame) -> list[str]:
    """Columns that no method makes."""
    return [name for name in SHARED if name in tokens] + [x for x in tokens if str(x).startswith(ATTRIBUTION)]


class _Arrays:
    """Arrays one behind the other, equal ones once."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._known: dict[bytes, tuple[int, str, int]] = {}
        self._end = 0

    def add(self, column: pd.Series) -> tuple[int, str, int]:
        """Offset behind the header, kind and length of these numbers."""
        values = column.to_numpy()
        if values.dtype == bool:
            kind, packed = "u1", values.astype(np.uint8).tobytes()
        else:
            kind = "f4" if values.dtype.kind == "f" else "u4"
            packed = values.astype(f"<{kind}").view(np.uint8).reshape(-1, 4).T.tobytes()
        key = kind.encode() + packed
        if key not in self._known:
            self._known[key] = (self._end, kind, len(values))
            self.parts.append(packed)
            self._end += len(packed)
        return self._known[key]
