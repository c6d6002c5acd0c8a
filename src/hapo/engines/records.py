"""Run records: a run is a folder of plain files that any tool can read.

    config.yaml        what the run was told
    manifest.json      versions, seeds, hashes, command
    metrics.jsonl      one JSON object a logged step
    evaluations.jsonl  one JSON object a measurement of held-out accuracy
    finished.json      how far the run came, and why it ended
    tokens/            step-NNNNNN-RANK.parquet, one row a token of a recorded rollout batch

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
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..batch import TokenBatch
from ..outputs import write_whole

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
    "latex2sympy2_extended",
    "antlr4-python3-runtime",  # math-verify answers differently with 4.9 and 4.13
)
BEGUN = ("config.yaml", "manifest.json", "metrics.jsonl", "tokens")
"""What the records of a run begin with, or write over."""
WRITTEN = (
    *(*BEGUN, "evaluations.jsonl", "finished.json", "checkpoints", "completions"),
    *("model", "model.partial", "model.old", "README.md", "report.html"),
)
"""All that a run writes into its folder, whatever engine runs it."""
RESERVE = 64 * 2**20
"""Bytes that a run may need beside its checkpoints."""


class RunRecords:
    """Writer of one run folder. Only the main process writes the shared files; each rank its own tokens."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.rank = rank
        self._tokens: list[pa.Table] = []
        self._without: list[list[float]] = []
        self._told: dict[str, str] = {}
        self._started = time.monotonic()

    @classmethod
    def create(
        cls, folder: Path, config: dict[str, Any], manifest: dict[str, Any], rank: int = 0, need: int = 0
    ) -> RunRecords:
        """Begin a new run.

        Raises:
            FileExistsError: the folder holds a run already, or another file of such a name.
            OSError: it cannot be written to, or has not `need` bytes left.
        """
        if rank == 0:
            if there := files_of_run(folder, BEGUN):
                raise FileExistsError(
                    f"the run folder {folder} exists, with {', '.join(there)}: choose another output_dir, remove "
                    "it, or resume its run"
                )
            check_writable(folder, need)
            write_whole(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            write_whole(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
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
            for file in (metrics, folder / "evaluations.jsonl"):
                if file.is_file():
                    kept = [line for line in file.read_text().splitlines() if _step_of(line) <= step]
                    write_whole(file, "".join(line + "\n" for line in kept))
            (folder / "finished.json").unlink(missing_ok=True)
            for file in (folder / "tokens").glob("step-*.parquet"):
                if int(file.name.split("-")[1]) > step:
                    file.unlink()
        return cls(folder, rank)

    def add_metrics(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, with the seconds since this process began the run."""
        if self.rank == 0:
            line = {**line, "wall_seconds": round(time.monotonic() - self._started, 3)}
            append_line(self.folder / "metrics.jsonl", line)

    def add_tokens(
        self,
        step: int,
        rollout: int,
        batch: TokenBatch,
        made: dict[str, Tensor],
        mask: Bool[Tensor, "B T"],
        response: Int[Tensor, " B"],
        responses: int,
        ids: Int[Tensor, "B T"],
        texts: list[list[str]],
        prompts: list[str],
        temperature: Float[Tensor, "B T"] | None,
        said: list[list[str | None]] | None = None,
    ) -> None:
        """Hold the tokens of a micro-batch until `write_tokens`.

        Args:
            step: optimiser step, from 1.
            rollout: first optimiser step of the rollout batch that the rows are of.
            batch: the prepared rows, with the current policy's log-probs.
            made: `LossOutput.tokens` of them; "gate", the mean of a token's gates, where the model has some;
                "staleness", how many versions older than the policy the weights were that drew a token; and
                "unmasked" and "confidence", when and how surely a masked-diffusion model drew each.
            mask: valid response tokens, those of dropped groups included.
            response: row of each response in the rollout batch.
            responses: rows of that whole batch whose rewards count.
            ids: token ids.
            texts: a string a token.
            prompts: a string a row.
            temperature: what each token was drawn at.
            said: where the responses hold text that is not the model's, as an environment's answers: what of it
                follows each token, or None.
        """
        mask = mask.cpu()
        if not mask.any():
            return
        self._told = {"rollout": str(rollout), "responses": str(responses)}
        meaningful = {  # nothing where a group was dropped
            "signal": made.get("signal"),
            "ratio": made["ratio"],
            "bound_low": made["low"],
            "bound_high": made["high"],
        }
        per_token = {
            "id": ids,
            "entropy": batch.old_entropy,
            "entropy_new": batch.entropy,
            "temperature": temperature,
            "logp_old": batch.old_logp,
            "logp_new": batch.logp,
            "logp_sampler": batch.sampler_logp,
            "logp_ref": batch.ref_logp,
            "weight": batch.weight,
            "token_reward": batch.token_reward,
            "advantage": batch.advantage,
            "advantage_used": made["advantage"],
            "gate": made.get("gate"),
            "staleness": made.get("staleness"),
            "unmasked": made.get("unmasked"),
            "confidence": made.get("confidence"),
            **{
                k: None if x is None else x.float().masked_fill(~batch.mask, torch.nan)
                for k, x in meaningful.items()
            },
            "clipped": made["clipped"] & batch.mask,
            "kept": made["kept"],
        }
        assert batch.group is not None and batch.reward is not None
        row, position = mask.nonzero(as_tuple=True)
        columns: dict[str, Any] = {
            "response": response.cpu()[row].numpy(),
            "position": position.numpy(),
            "prompt": pa.array(prompts).take(pa.array(row.numpy())),
            "group": batch.group.cpu()[row].numpy(),
            "reward": batch.reward.cpu().float()[row].numpy(),
            "verdict": (batch.reward if batch.verdict is None else batch.verdict).cpu().float()[row].numpy(),
            "text": pa.array(
                [texts[i][t] for i, t in zip(row.tolist(), position.tolist(), strict=True)], pa.string()
            ),
        }
        if said is not None:
            after = [said[i][t] for i, t in zip(row.tolist(), position.tolist(), strict=True)]
            columns["said"] = pa.array(after, pa.string())
        for name, x in per_token.items():
            if x is not None:
                x = x.detach().cpu()[mask]
                columns[name] = (x.float() if x.is_floating_point() else x).numpy()
        n = len(row)
        table = pa.table({"rollout": np.full(n, rollout), "step": np.full(n, step), **columns})
        self._tokens.append(table.replace_schema_metadata(None))

    def add_targets(
        self,
        step: int,
        batch: TokenBatch,
        weight: Float[Tensor, "B T"],
        response: Int[Tensor, " B"],
        ids: Int[Tensor, "B T"],
        texts: list[list[str]],
        prompts: list[str],
        gate: Float[Tensor, "B T"] | None = None,
    ) -> None:
        """Hold the targets of demonstrations until `write_tokens`; each is a group, and the step their batch.

        Args:
            step: optimiser step, from 1.
            batch: `mask`, and the current policy's `logp`, `entropy`, `rank` and `expected_rank`.
            weight: of each target in the loss.
            response: number of each demonstration within the step.
            ids: token ids.
            texts: a string a token.
            prompts: a string a row.
            gate: mean of a token's gates, where the model has some.
        """
        if not batch.mask.any():
            return
        self._told = {"rollout": str(step)}
        row, position = batch.mask.cpu().nonzero(as_tuple=True)
        number = response.cpu()[row].numpy()
        columns: dict[str, Any] = {
            "response": number,
            "position": position.numpy(),
            "prompt": pa.array(prompts).take(pa.array(row.numpy())),
            "group": number,
            "text": pa.array(
                [texts[i][t] for i, t in zip(row.tolist(), position.tolist(), strict=True)], pa.string()
            ),
        }
        scores = {name: getattr(batch, name) for name in ("entropy", "logp", "rank", "expected_rank")}
        for name, x in {"id": ids, **scores, "weight": weight, "gate": gate}.items():
            if x is not None:
                x = x.detach().cpu()[batch.mask.cpu()]
                columns[name] = (x.float() if x.is_floating_point() else x).numpy()
        n = len(row)
        self._tokens.append(pa.table({"rollout": np.full(n, step), "step": np.full(n, step), **columns}))

    def add_columns(self, step: int, columns: dict[str, Any]) -> None:
        """Hold tokens of a loop of hapo's own until `write_tokens`: a column of numbers or texts each.

        Every optimiser step has a rollout batch of its own there.

        Args:
            step: optimiser step, from 1.
            columns: position, prompt, response, group, reward, verdict, text, id, and what the loop knows.
        """
        self._told = {"rollout": str(step)}
        n = len(columns["position"])
        self._tokens.append(pa.table({"rollout": np.full(n, step), "step": np.full(n, step), **columns}))

    def add_rewards(
        self,
        rollout: int,
        batch: TokenBatch,
        mask: Bool[Tensor, "B T"],
        response: Int[Tensor, " B"],
        responses: int,
    ) -> None:
        """Hold the rewards of responses without a valid token, which count in their group, until `write_tokens`.

        They have no line of their own: the file's metadata has them. The arguments are those of `add_tokens`.
        """
        self._told = {"rollout": str(rollout), "responses": str(responses)}
        assert batch.group is not None and batch.reward is not None
        rows = (batch.scored & ~mask.any(1)).nonzero().squeeze(1)
        verdict = batch.reward if batch.verdict is None else batch.verdict
        columns = (x[rows].tolist() for x in (response, batch.group, batch.reward, verdict))
        self._without += [list(row) for row in zip(*columns, strict=True)]

    def write_tokens(self, step: int) -> None:
        """Write what was held as tokens/step-NNNNNN-RANK.parquet."""
        if self._tokens or self._without:
            target = self.folder / "tokens" / f"step-{step:06d}-{self.rank}.parquet"
            target.parent.mkdir(exist_ok=True)
            partial = target.with_suffix(".partial")
            table = pa.concat_tables(self._tokens) if self._tokens else pa.table({})
            told = {**self._told, "without_tokens": json.dumps(self._without)}
            pq.write_table(table.replace_schema_metadata(told), partial, compression="zstd")
            os.replace(partial, target)
        self._tokens, self._without = [], []


def files_of_run(folder: Path, names: Sequence[str] = WRITTEN) -> list[str]:
    """Which of these names of a run's files and folders are there, so that a new run would write over them."""
    return [name for name in names if os.path.lexists(folder / name)]


def append_line(file: Path, line: dict[str, Any]) -> None:
    """Append one JSON object to a .jsonl file, in one call of the system."""
    with file.open("ab", buffering=0) as out:
        out.write(json.dumps(line).encode() + b"\n")


def check_writable(folder: Path, need: int = 0) -> None:
    """Make the folder, and find out now whether it can be written to.

    Raises:
        OSError: it cannot, with the reason; or fewer than `need` bytes are free.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
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
