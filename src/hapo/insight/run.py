"""A run folder, read back; and what any method would do to the tokens that it recorded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import yaml

import hapo

from ..outputs import file_hash
from .token_files import KEYS, TokenFiles

if TYPE_CHECKING:
    import torch
    from jaxtyping import Int
    from torch import Tensor

    from ..batch import TokenBatch
    from ..method import Method

TOKEN_COLUMNS = {
    "logp_old": "old_logp",
    "logp_new": "logp",
    "logp_ref": "ref_logp",
    "logp_sampler": "sampler_logp",
    "entropy": "old_entropy",
    "entropy_new": "entropy",
    "token_reward": "token_reward",
}
"""Column of the token records -> field of `TokenBatch`."""


@dataclass(frozen=True)
class Rollout:
    """A recorded rollout batch: B responses of up to T tokens, as the method met them before `prepare`."""

    batch: TokenBatch
    step: Int[Tensor, " B"]
    """Optimiser step in which each response was used."""
    response: Int[Tensor, " B"]
    """Row of each response in the rollout batch."""
    complete: bool
    """Every response of the rollout batch was recorded: what a method makes of it is what training made of it."""
    without_tokens: TokenBatch
    """Responses without a valid token, whose rewards count in their groups: rows of an empty mask."""


class Run:
    """The folder of a run, from any engine.

    Raises:
        FileNotFoundError: it is none, with the file that is missing.
        ValueError: one of its files is broken.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        for name in ("config.yaml", "metrics.jsonl"):
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"{self.folder} is no run folder: it has no {name}")
        try:
            self.config: dict[str, Any] = yaml.safe_load((self.folder / "config.yaml").read_text()) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{self.folder / 'config.yaml'} is malformed: {error}") from error

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Versions, seeds, hashes, command; empty where there is none."""
        return self._json("manifest.json") or {}

    @cached_property
    def finished(self) -> dict[str, Any] | None:
        """How far the run came and why it ended; None while it runs, or if it was stopped."""
        return self._json("finished.json")

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row a logged optimiser step; a value that a step did not log is NaN."""
        lines = [line for line in self._lines("metrics.jsonl") if "loss" in line]
        return pd.DataFrame(lines, columns=None if lines else ["step"])

    @cached_property
    def evaluations(self) -> pd.DataFrame:
        """One row a measurement of held-out accuracy, in the order of training."""
        columns = ["step", "num_tokens", "seconds", "how", "mean", "low", "high", "problems", "samples", "binary"]
        return pd.DataFrame(self._lines("evaluations.jsonl"), columns=[*columns, "scores"])

    @cached_property
    def rollouts(self) -> list[int]:
        """First optimiser steps of the recorded rollout batches that have tokens."""
        return sorted({file.rollout for file in self._files.files if file.rows})

    def tokens(
        self,
        rollout: int | None = None,
        columns: Sequence[str] | None = None,
        responses: Collection[int] | None = None,
    ) -> pd.DataFrame:
        """The recorded tokens, of one rollout batch or of all, by rollout, response, step and position.

        Strings, which repeat, are categories.

        Args:
            rollout: first optimiser step of the rollout batch.
            columns: to read, of those that the records have; all of them unless told.
            responses: rows of the rollout batch to read; all of them unless told.

        Raises:
            ValueError: there is no such rollout batch.
        """
        if rollout is not None and rollout not in self.rollouts:
            raise ValueError(f"{self.folder}: no rollout batch {rollout} was recorded, only {self.rollouts}")
        if not self.rollouts:
            return pd.DataFrame(columns=["rollout", "step", "response", "position", "prompt", "text"])
        every = self.rollouts if rollout is None else [rollout]
        tables = [self._files.read(first, columns, responses) for first in every]
        return pa.concat_tables(tables, promote_options="default").unify_dictionaries().to_pandas()

    def columns(self, rollouts: Collection[int]) -> set[str]:
        """Of the records of some rollout batches, those that any of them has."""
        return {name for first in rollouts for file in self._files.of(first) for name in file.columns}

    def count(self, rollout: int) -> int:
        """Recorded tokens of a rollout batch."""
        return sum(file.rows for file in self._files.of(rollout))

    @property
    def supervised(self) -> bool:
        """Whether it learnt from demonstrations: its records are of targets, see `hapo.insight.targets`."""
        return self.manifest.get("kind") == "supervised"

    @property
    def agent(self) -> bool:
        """Whether it trained an agent with a critic: its records hold Q values, see `hapo.insight.agents`."""
        return self.manifest.get("kind") == "agent"

    def held_out_loss(self) -> pd.DataFrame:
        """One row a measurement of the loss on held-out demonstrations, with step, eval_loss and others."""
        lines = [line for line in self._lines("metrics.jsonl") if "eval_loss" in line]
        return pd.DataFrame(lines, columns=None if lines else ["step", "eval_loss"])

    def method(self) -> Method:
        """The method that the run was trained with; of a supervised run see `hapo.insight.targets`.

        Raises:
            ValueError: it names none, as a baseline of TRL's own.
        """
        if "method" not in self.config:
            raise ValueError(f"{self.folder} was not trained with a method of hapo")
        options = dict(self.config.get("method_options") or {})
        if self.config.get("beta") is not None:
            options["kl_coef"] = self.config["beta"]
        from ..methods import policy

        return policy(self.config["method"], **options)

    def rollout(self, first: int) -> Rollout:
        """A recorded rollout batch as tensors.

        Raises:
            ValueError: there is no such rollout batch.
        """
        import torch

        keys = self.tokens(first, ["response", "step", "position", "group", "reward", "verdict"])
        place = keys[["response", "step"]].to_numpy()
        begins = np.r_[True, (place[1:] != place[:-1]).any(1)]
        heads = keys[begins]
        where = torch.from_numpy(begins.cumsum() - 1), torch.tensor(keys["position"].to_numpy())
        shape = len(heads), int(where[1].max()) + 1
        del keys, place

        def padded(values: np.ndarray, dtype: torch.dtype) -> Tensor:
            out = torch.zeros(shape, dtype=dtype)
            out[where] = torch.tensor(values, dtype=dtype)
            return out

        fields: dict[str, Any] = {}
        for column, name in TOKEN_COLUMNS.items():  # one at a time: a rollout batch may be large
            values = self.tokens(first, [column]).get(column)
            if values is not None and column == "logp_sampler":  # where vLLM has none, training takes the old one
                values = values.fillna(self.tokens(first, ["logp_old"])["logp_old"])
            if values is not None and values.notna().all():
                fields[name] = padded(values.to_numpy(), torch.float32)
        batch = hapo.TokenBatch(
            mask=padded(np.ones(len(begins)), torch.bool),
            reward=torch.tensor(heads["reward"].to_numpy(), dtype=torch.float32),
            verdict=torch.tensor(heads["verdict"].to_numpy(), dtype=torch.float32),
            group=torch.tensor(heads["group"].to_numpy()),
            **fields,
        )
        lines = self._files.without_tokens(first)
        empty = torch.tensor([line[1:] for line in lines]).reshape(-1, 3)
        without: dict[str, Any] = {
            name: torch.zeros(len(empty), shape[1], dtype=x.dtype) for name, x in fields.items()
        }
        return Rollout(
            batch=batch,
            step=torch.tensor(heads["step"].to_numpy()),
            response=torch.tensor(heads["response"].to_numpy()),
            complete=heads["response"].nunique() + len(lines) == self._files.responses(first),
            without_tokens=hapo.TokenBatch(
                mask=torch.zeros(len(empty), shape[1], dtype=torch.bool),
                group=empty[:, 0].long(),
                reward=empty[:, 1].float(),
                verdict=empty[:, 2].float(),
                **without,
            ),
        )

    def pushes(self, first: int) -> tuple[np.ndarray, bool]:
        """Of a rollout batch the push of the run's method on each token, as `recompute` has it, and `complete`."""
        if first not in self._pushes:
            rollout = self.rollout(first)
            push = recompute(rollout, self.method(), ["push"])["push"].to_numpy(copy=True)
            self._pushes[first] = push, rollout.complete
        return self._pushes[first]

    @cached_property
    def _pushes(self) -> dict[int, tuple[np.ndarray, bool]]:
        """Those that were made: 4 bytes for each token, and seconds to make them again."""
        return {}

    @cached_property
    def _files(self) -> TokenFiles:
        return TokenFiles(self.folder / "tokens")

    def _json(self, name: str) -> dict[str, Any] | None:
        file = self.folder / name
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is malformed: {error}") from error

    def _lines(self, name: str) -> list[dict[str, Any]]:
        file = self.folder / name
        lines = file.read_text().splitlines() if file.is_file() else []
        found = []
        for number, line in enumerate(lines, 1):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number == len(lines):  # being written, or cut short by a kill
                    break
                raise ValueError(f"{file}, line {number} is malformed: {error}") from error
        return found


def of_runs(runs: Iterable[Run]) -> str:
    """One hash for which runs these are, wherever they lie: of their manifests, which a longer run keeps."""
    files = ((run.folder / "manifest.json", run.folder / "config.yaml") for run in runs)
    each = sorted(file_hash(manifest if manifest.is_file() else config) for manifest, config in files)
    return hashlib.sha256("\n".join(each).encode()).hexdigest()


def parse_method(spec: str) -> Method:
    """The method of a text `NAME[:option=value,...]`, its values read as YAML: `hapo:components=BCD,eps_high=0.3`.

    Raises:
        ValueError: unknown method or option, a value out of range, or a text of another form.
    """
    from ..methods import policy

    name, options = parse_arm(spec)
    return policy(name, **options)


def parse_arm(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a text `NAME[:option=value,...]`, the values read as YAML.

    Raises:
        ValueError: a part has no `=`, or a value is no YAML.
    """
    cut = spec.rfind(":", 0, spec.find("=")) if "=" in spec else len(spec)
    name, rest = spec[:cut], spec[cut + 1 :]
    options: dict[str, Any] = {}
    for part in _split(rest):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{spec!r}: {part!r} is no option=value; write NAME:option=value,option=value")
        try:
            read = yaml.safe_load(value)
            options[key.strip()] = float(read) if _is_number(read) else read
        except yaml.YAMLError as error:
            raise ValueError(f"{spec!r}: the value of {key.strip()} is no YAML: {value!r}") from error
    return name, options


def recompute(rollout: Rollout, method: Method, columns: Collection[str] | None = None) -> pd.DataFrame:
    """What `method` does to the tokens of a rollout batch: prepare over the batch, step and loss a step.

    One row a token, in the order of `Run.tokens`: response, step, position, advantage, advantage_used, ratio,
    bound_low, bound_high, clipped, kept, push, and where the method has them signal and weight. NaN in the
    ratio, the bounds and the signal where the method drops the token's group.

    push = −N dL/dlogp with N the valid tokens of the optimiser step: how strongly the step raises (> 0) or
    lowers (< 0) the log-prob of the token; ratio times advantage under a token mean with nothing clipped.

    Args:
        rollout: whose tokens.
        method: to apply.
        columns: of these, those that the table has; all of them unless told.

    Raises:
        ValueError: the records lack a column that the method reads, or the method makes no such column.
    """
    import torch

    whole = rollout.batch
    names = rollout.response.tolist()
    first = {response: i for i, response in reversed(list(enumerate(names)))}  # several iterations
    places = {response: place for place, response in enumerate(sorted(first))}
    # Rows without tokens come last: their rewards count here, and no step has them.
    batch = method.prepare(_joined(whole.rows([first[response] for response in places]), rollout.without_tokens))
    row, position = whole.mask.nonzero(as_tuple=True)
    steps = rollout.step[row]
    table: dict[str, np.ndarray] = {
        "response": rollout.response[row].numpy(),
        "step": steps.numpy(),
        "position": position.numpy(),
    }
    table = {name: values for name, values in table.items() if columns is None or name in columns}
    for step in rollout.step.unique().tolist():
        index = (rollout.step == step).nonzero().squeeze(1)
        now = whole.rows(index)
        rows = batch.rows([places[names[i]] for i in index.tolist()])
        rows = method.step(rows.replace(logp=now.logp, entropy=now.entropy))
        assert now.logp is not None and rows.totals is not None and rows.advantage is not None
        logp, totals, advantage = now.logp.clone().requires_grad_(), rows.totals, rows.advantage
        rows = rows.replace(logp=logp)
        out = method.loss(rows)
        push = torch.zeros_like(logp)
        if out.loss.requires_grad:
            (gradient,) = torch.autograd.grad(out.loss, logp)
            push = -gradient * max(totals.tokens, 1)
        dropped = ~rows.mask
        made: dict[str, Tensor] = {
            "advantage": advantage,
            "advantage_used": out.tokens["advantage"].masked_fill(dropped, 0.0),
            "ratio": out.tokens["ratio"].masked_fill(dropped, torch.nan),
            "bound_low": out.tokens["low"].masked_fill(dropped, torch.nan),
            "bound_high": out.tokens["high"].masked_fill(dropped, torch.nan),
            "clipped": out.tokens["clipped"] & rows.mask,
            "kept": out.tokens["kept"],
            "push": push,
        }
        if "signal" in out.tokens:
            made["signal"] = out.tokens["signal"].masked_fill(dropped, torch.nan)
        if rows.weight is not None:
            made["weight"] = rows.weight
        mask, taken = whole.mask[index], (steps == step).numpy()
        if unknown := set(columns or ()) - made.keys() - set(KEYS):
            raise ValueError(f"{method.name} makes no column {sorted(unknown)[0]!r}, only {', '.join(made)}")
        for name in made if columns is None else [name for name in made if name in columns]:
            values = made[name].detach()[mask].numpy()
            table.setdefault(name, np.empty(len(taken), values.dtype))[taken] = values
    return pd.DataFrame(table)


def _joined(one: TokenBatch, other: TokenBatch) -> TokenBatch:
    """The rows of both; both have the same fields."""
    import torch

    tensors = {name: x for name, x in vars(one).items() if isinstance(x, torch.Tensor)}
    joined: dict[str, Any] = {name: torch.cat([x, getattr(other, name)]) for name, x in tensors.items()}
    return hapo.TokenBatch(**joined)


def _is_number(value: Any) -> bool:
    """YAML 1.1 takes 1e-4 for text."""
    return isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?e[-+]?\d+", value) is not None


def _split(text: str) -> list[str]:
    """Parts between commas that stand in no brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]
