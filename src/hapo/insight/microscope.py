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
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..method import Method
from ..supervised import Supervised
from .figures import labels
from .run import Run, parse_method, recompute
from .targets import READ, method_of_targets, parse_supervised, reweigh
from .token_figures import spread

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


MOST = 3
"""Rollout batches that a page holds in part, where the first one does not fit."""
PROBE = 2**15
"""Tokens that are encoded to learn how long the data of a large rollout batch would be."""
SLACK = 1.25
"""Such an estimate may be too long by so much: what is nearer to the budget is encoded to see."""


@dataclass(frozen=True)
class Encoded:
    """A rollout batch, or some responses of it, as the page holds it."""

    rollout: int
    """First optimiser step of the rollout batch."""
    data: str
    """Base64 of a gzip stream."""
    responses: int
    """Responses in the data, one for each optimiser step that used it."""
    recorded: int
    """Responses that the run recorded."""
    left: list[int]
    """Prompts, by their group, of which responses are left out."""
    complete: bool
    """Every response of the rollout batch was recorded."""


def microscope(
    runs: Sequence[Run],
    *,
    against: Sequence[str | Method | Supervised] = (),
    nonce: str,
    rollouts: Sequence[int] | None = None,
    prompts: Sequence[int] | None = None,
    budget: int = BUDGET,
) -> Markup:
    """The section of a page that shows the recorded tokens of some runs.

    Args:
        runs: those without token records are named as such.
        against: other methods for the same rollouts, as `parse_method` reads them, or built.
        nonce: of the page's content security policy, for the script.
        rollouts: recorded rollout batches to show, by their first optimiser step; None takes as many as fit:
            the first, the last, then again and again the one farthest from those taken.
        prompts: of these rollout batches, by their `group`; None takes all.
        budget: characters of encoded data, in equal parts for every run. Where the first rollout batch is too
            large by itself, `sample` says what the page holds of it, of the last and of a middle one.

    Raises:
        ValueError: an unknown method, a rollout batch that a run did not record, a prompt that none of them has,
            or records that lack what a method reads.
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
        batch = lru_cache(maxsize=1)(partial(_Batch, run, [method for _, method in others], prompts))
        if prompts is not None:
            there = {first: set(run.tokens(first, ["group"])["group"]) for first in wanted}
            if unknown := sorted(set(prompts).difference(*there.values())):
                raise ValueError(f"{run.folder}: no prompt {unknown[0]} in the rollout batches {wanted}")
            wanted = [first for first in wanted if there[first].intersection(prompts)]
        encoded = _fitting(batch, wanted, share)
        places = [f"mx-{number}-{item.rollout}" for item in encoded]
        blobs += [(place, item.data) for place, item in zip(places, encoded, strict=True)]
        index.append(
            {
                "name": name,
                "command": f"hapo report {shlex.quote(str(run.folder))} --rollouts",
                "methods": [run.config["method"], *(spec for spec, _ in others)],
                "rollouts": [{**asdict(item), "data": x} for x, item in zip(places, encoded, strict=True)],
                "left": sorted(set(run.rollouts) - {item.rollout for item in encoded}),
                "asked": prompts is not None,
            }
        )
    template = PAGES.get_template("microscope.html")
    return Markup(template.render(runs=index, blobs=blobs, empty=empty, nonce=nonce))


def encode(
    run: Run, first: int, others: Sequence[Method | Supervised], responses: Collection[int] | None = None
) -> Encoded:
    """A recorded rollout batch under its own method and under others; some of its responses if told.

    The methods see the whole rollout batch in any case.

    Raises:
        ValueError: no such rollout batch, or its records lack what a method reads.
    """
    return _Batch(run, others, None, first).encoded(responses)


def sample(heads: pd.DataFrame, most: int, seed: int) -> list[int]:
    """Responses of a rollout batch for a page that cannot hold all of them, of at most so many tokens together.

    Whole groups, as long as they fit: the one with the most mixed verdicts, the one with the highest mean reward,
    the one with the lowest, then the others as drawn with the seed. Where none fits, responses of the first of
    them, right and wrong ones in turn; one at least.

    Args:
        heads: a row for each response: response, group, tokens, and reward and verdict where they have some.
        most: tokens.
        seed: of the draw.
    """
    groups = heads.groupby("group", sort=True)
    order = np.random.default_rng(seed).permutation(list(groups.groups)).tolist()
    if "verdict" in heads:
        right = (heads["verdict"] > 0).groupby(heads["group"]).mean()
        reward = groups["reward"].mean()
        order = list(dict.fromkeys([(right - 0.5).abs().idxmin(), reward.idxmax(), reward.idxmin(), *order]))
    tokens, chosen, held = groups["tokens"].sum(), [], 0
    for group in order:
        if held + tokens[group] <= most:
            chosen += groups.get_group(group)["response"].tolist()
            held += tokens[group]
    if chosen:
        return chosen
    first = groups.get_group(order[0])
    if "verdict" in first:
        turn = first.groupby(first["verdict"] > 0).cumcount()
        first = first.loc[turn.sort_values(kind="stable").index]
    fits = int((first["tokens"].cumsum() <= most).sum())
    return first["response"].tolist()[: max(fits, 1)]


class _Batch:
    """A recorded rollout batch, or some prompts of it, under its own method and under others."""

    def __init__(
        self, run: Run, others: Sequence[Method | Supervised], prompts: Sequence[int] | None, first: int
    ) -> None:
        self.run, self.first, self._others, self._prompts = run, first, others, prompts

    @cached_property
    def heads(self) -> pd.DataFrame:
        """A row for each recorded response: response, group, tokens, uses, reward, verdict."""
        table = self.run.tokens(self.first, ["response", "step", "group", "reward", "verdict"])
        found = table.groupby("response").agg(uses=("step", "nunique"), tokens=("step", "size"))
        firsts = table.drop_duplicates("response").drop(columns="step").set_index("response")
        return found.join(firsts).reset_index()

    @property
    def wanted(self) -> pd.DataFrame:
        """Of the prompts that are asked for."""
        return self.heads if self._prompts is None else self.heads[self.heads["group"].isin(self._prompts)]

    @cached_property
    def _made(self) -> tuple[list[pd.DataFrame], bool]:
        """What the methods make of all its tokens, and whether it was recorded whole."""
        if self.run.supervised:
            own = [
                method_of_targets(self.run),
                *(method for method in self._others if isinstance(method, Supervised)),
            ]
            targets = self.run.tokens(self.first, READ)
            return [reweigh(targets, method) for method in own], True
        push, complete = self.run.pushes(self.first)
        methods = [method for method in self._others if isinstance(method, Method)]
        rollout = self.run.rollout(self.first) if methods else None
        others = [] if rollout is None else [recompute(rollout, method) for method in methods]
        return [pd.DataFrame({"push": push}), *others], complete

    def encoded(self, responses: Collection[int] | None = None) -> Encoded:
        """These responses of it; all of the wanted ones unless told."""
        responses = self.wanted["response"].tolist() if responses is None else responses
        tokens = self.run.tokens(self.first, responses=responses)
        tables, complete = [tokens], True  # of an agent, whose records hold all that the update made of a token
        if not self.run.agent:
            made, complete = self._made
            chosen = self.run.tokens(self.first, ["response"])["response"].isin(responses).to_numpy()
            own, *tables = (table[chosen].reset_index(drop=True) for table in made)
            tables = [tokens.assign(**own), *tables]
        order = np.argsort(tokens.groupby("group", sort=False).ngroup().to_numpy(), kind="stable")
        data = _pack(tokens.iloc[order], [table.iloc[order] for table in tables])
        held = self.heads["response"].isin(responses)
        left = sorted(self.heads.loc[~held, "group"].unique().tolist())
        uses = self.heads["uses"]
        return Encoded(self.first, data, int(uses[held].sum()), int(uses.sum()), left, complete)


def _fitting(batch: Callable[[int], _Batch], wanted: Sequence[int], budget: int) -> list[Encoded]:
    """Of the wanted rollout batches what the budget holds, in the order of training; a part of one at least."""
    taken: dict[int, Encoded] = {}
    held, tokens = 0, 0
    per_token = _characters(batch(wanted[0]))
    for place in _farthest_first(len(wanted)):
        one = batch(wanted[place])
        size = int(one.wanted["tokens"].sum())
        if size * per_token > SLACK * (budget - held):
            break
        item = one.encoded()
        held, tokens = held + len(item.data), tokens + size
        per_token = held / tokens
        if held > budget:
            break
        taken[place] = item
    if not taken:
        return _parts(batch, wanted, per_token, budget)
    return [taken[place] for place in sorted(taken)]


def _parts(batch: Callable[[int], _Batch], wanted: Sequence[int], per_token: float, budget: int) -> list[Encoded]:
    """Parts of the first, the last and a middle rollout batch; of fewer where a group would not fit a part."""
    groups = batch(wanted[0]).wanted.groupby("group")["tokens"].sum()
    number = max(1, min(MOST, len(wanted), int(budget / per_token / groups.mean())))
    parts: list[Encoded] = []
    for left, first in zip(range(number, 0, -1), spread(wanted, number), strict=True):
        share = (budget - sum(len(part.data) for part in parts)) / left
        chosen = sample(batch(first).wanted, int(share / per_token), first)
        part = batch(first).encoded(chosen)
        while len(part.data) > share and len(chosen) > 1:
            chosen = chosen[: max(1, int(len(chosen) * share / len(part.data)))]
            part = batch(first).encoded(chosen)
        parts.append(part)
    return parts


def _characters(batch: _Batch) -> float:
    """Of the data for each token: of a part of a large rollout batch; 0 of one that is quickly encoded whole."""
    heads = batch.wanted
    if heads["tokens"].sum() <= 2 * PROBE:
        return 0.0
    chosen = sample(heads, PROBE, batch.first)
    return len(batch.encoded(chosen).data) / int(heads.loc[heads["response"].isin(chosen), "tokens"].sum())


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
