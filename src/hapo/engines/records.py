"""Run records: a run is a folder of plain files that any tool can read.

    config.yaml     what the run was told
    manifest.json   versions, seeds, hashes, command
    metrics.jsonl   one JSON object a logged step
    tokens/         step-NNNNNN-RANK.parquet, one row a token

Engine-free: an engine hands over plain values and a `TokenBatch`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from torch import Tensor

from ..batch import TokenBatch
from ..method import LossOutput

PACKAGES = (
    "hapo",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "peft",
    "verl",
    "vllm",
    "math-verify",
)
RESERVE = 64 * 2**20
"""Bytes that a run may need beside its checkpoints."""


class RunRecords:
    """Writer of one run folder. Only the main process writes the shared files; each rank its own tokens."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.rank = rank
        self._tokens: list[pa.Table] = []
        self._rows = 0
        self._started = time.monotonic()

    @classmethod
    def create(
        cls, folder: Path, config: dict[str, Any], manifest: dict[str, Any], rank: int = 0, need: int = 0
    ) -> RunRecords:
        """Begin a new run.

        Raises:
            FileExistsError: the folder holds a run already.
            OSError: it cannot be written to, or has not `need` bytes left.
        """
        if rank == 0:
            if (folder / "manifest.json").exists():
                raise FileExistsError(
                    f"the run folder {folder} exists: choose another output_dir, remove it, or resume its run"
                )
            check_writable(folder, need)
            (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
            (folder / "metrics.jsonl").touch()
        return cls(folder, rank)

    @classmethod
    def resume(cls, folder: Path, step: int, rank: int = 0) -> RunRecords:
        """Go on with a run after optimiser step `step`: records of later steps are taken back.

        Raises:
            FileNotFoundError: the folder holds no run.
        """
        metrics = folder / "metrics.jsonl"
        if not metrics.is_file():
            raise FileNotFoundError(f"{folder} holds no run to resume: {metrics.name} is missing")
        if rank == 0:
            kept = [line for line in metrics.read_text().splitlines() if _step_of(line) <= step]
            partial = metrics.with_suffix(".partial")
            partial.write_text("".join(line + "\n" for line in kept))
            os.replace(partial, metrics)
            for file in (folder / "tokens").glob("step-*.parquet"):
                if int(file.name.split("-")[1]) > step:
                    file.unlink()
        return cls(folder, rank)

    def add_metrics(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, with the seconds since this process began the run."""
        if self.rank == 0:
            line = {**line, "wall_seconds": round(time.monotonic() - self._started, 3)}
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    def add_tokens(
        self,
        step: int,
        batch: TokenBatch,
        out: LossOutput,
        ids: Tensor,
        texts: list[list[str]],
        prompts: list[str],
        temperature: Tensor | None,
        most: int,
    ) -> None:
        """Hold the tokens of a micro-batch until `write_tokens`; at most `most` responses a record.

        `ids` (B,T), `texts` one string a token, `prompts` one a row, `temperature` (B,T) that each token was
        drawn at.
        """
        rows = min(len(batch), most - self._rows)
        mask = batch.mask[:rows].cpu()
        if not mask.any():  # an empty table has columns without a type
            self._rows += rows
            return
        columns: dict[str, list[Any]] = {}
        per_token = {
            "id": ids,
            "entropy": batch.old_entropy,
            "entropy_new": batch.entropy,
            "signal": out.tokens.get("signal"),
            "temperature": temperature,
            "logp_old": batch.old_logp,
            "logp_new": batch.logp,
            "logp_sampler": batch.sampler_logp,
            "logp_ref": batch.ref_logp,
            "weight": batch.weight,
            "advantage": batch.advantage,
            "advantage_used": out.tokens["advantage"],
            "ratio": out.tokens["ratio"],
            "bound_low": out.tokens["low"],
            "bound_high": out.tokens["high"],
            "clipped": out.tokens["clipped"],
            "kept": batch.keep,
        }
        index = mask.nonzero()
        columns["response"] = (index[:, 0] + self._rows).tolist()
        columns["position"] = index[:, 1].tolist()
        columns["prompt"] = [prompts[i] for i in index[:, 0].tolist()]
        columns["group"] = batch.group[:rows].cpu()[index[:, 0]].tolist()
        columns["reward"] = batch.reward[:rows].cpu()[index[:, 0]].tolist()
        columns["text"] = [texts[i][t] for i, t in index.tolist()]
        for name, value in per_token.items():
            if value is not None:
                columns[name] = value[:rows].detach().cpu()[mask].tolist()
        self._rows += rows
        table = pa.table({"step": [step] * len(index), **columns})
        self._tokens.append(table)

    def write_tokens(self, step: int) -> None:
        """Write what was held as tokens/step-NNNNNN-RANK.parquet."""
        if self._tokens:
            target = self.folder / "tokens" / f"step-{step:06d}-{self.rank}.parquet"
            target.parent.mkdir(exist_ok=True)
            partial = target.with_suffix(".partial")
            pq.write_table(pa.concat_tables(self._tokens), partial, compression="zstd")
            os.replace(partial, target)
        self._tokens, self._rows = [], 0


def check_writable(folder: Path, need: int = 0) -> None:
    """Make the folder, and find out now whether it can be written to.

    Raises:
        OSError: it cannot, with the reason; or fewer than `need` bytes are free.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"  # several ranks look at once
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"the run folder {folder} cannot be written to ({error.strerror}): choose another output_dir"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < need + RESERVE:
        raise OSError(
            f"the run folder {folder} has {free / 2**30:.2f} GiB left and the run needs about "
            f"{(need + RESERVE) / 2**30:.2f} GiB: choose another output_dir, or save less often "
            "(save_total_limit, save_only_model)"
        )


def manifest(seed: int, **more: Any) -> dict[str, Any]:
    """Versions, machine, seed and command of this process, and whatever else identifies the run."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": versions,
        "seed": seed,
        **more,
    }


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 over names and values of all parameters: which weights a run began with."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line).get("step", 0))
    except json.JSONDecodeError:  # a line that a killed process left half written
        return sys.maxsize
