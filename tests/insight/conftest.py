"""Run folders made of thin air: plausible numbers, and token records that are what the core says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import hapo
from hapo.engines.records import RunRecords

STEPS_PER_RECORD = 8
WORDS = (" the", "The", " so", "So", " wait", " but", "=", "+", "7", "12", " prime", "\n\n", " if", ",")
UNCERTAIN = {" the": 0.02, "The": 1.4, " so": 0.6, "So": 1.1, " wait": 1.8, " but": 1.2, " if": 0.9}
"""Typical entropy of a word, nats; 0.08 where it is not named."""

Change = Callable[[dict[str, Any]], dict[str, Any]]


def make_run(
    folder: Path,
    method: str | None = "hapo",
    rollouts: int = 3,
    groups: int = 4,
    size: int = 4,
    length: int = 24,
    *,
    options: dict[str, Any] | None = None,
    updates: int = 2,
    seed: int = 0,
    ranks: int = 1,
    steps: int | None = None,
    words: Sequence[str] = WORDS,
    prompts: Sequence[str] | None = None,
    rewards: Callable[[np.random.Generator, int, int], np.ndarray] | None = None,
    lines: Change | None = None,
    rows: Callable[[pa.Table], pa.Table] | None = None,
    config: dict[str, Any] | None = None,
    manifest: dict[str, Any] | None = None,
    tokens: bool = True,
    temperature: bool = True,
    evaluations: bool = True,
    finished: bool = True,
) -> Path:
    """Write a run folder and return it.

    Args:
        folder: made here.
        method: None is a run of TRL's own trainer: no method, no token records.
        rollouts: recorded rollout batches; one starts at every eighth optimiser step.
        groups: prompts of a rollout batch.
        size: responses to a prompt.
        length: most tokens of a response.
        options: of the method.
        updates: optimiser steps of a rollout batch.
        seed: of everything.
        ranks: token files of a rollout batch.
        steps: logged steps; `8 * rollouts` unless told.
        words: what the responses are made of.
        prompts: what they answer, in turn.
        rewards: (generator, groups, size) -> rewards; their sign is the verdict.
        lines: changes a line of metrics.jsonl before it is written.
        rows: changes a table of token records before it is written.
        config: put over config.yaml.
        manifest: put over manifest.json.
        tokens: token records.
        temperature: an adaptive temperature, where the method has one.
        evaluations: evaluations.jsonl.
        finished: finished.json; without it the run was stopped.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    steps = STEPS_PER_RECORD * rollouts if steps is None else steps
    built = None if method is None else hapo.method(method, **(options or {}))
    adaptive = temperature and built is not None and built.temperature_rule is not None
    _write_config(folder, method, options or {}, seed, config or {}, size, updates, length)
    _write_manifest(folder, seed, manifest or {}, ranks)
    written = [_metrics(rng, step, steps, length, built, adaptive) for step in range(1, steps + 1)]
    with (folder / "metrics.jsonl").open("w") as file:
        for line in written:
            file.write(json.dumps(line if lines is None else lines(line)) + "\n")
    if evaluations:
        _write_evaluations(folder, rng, written)
    if finished and written:
        done = {
            "steps": steps,
            "num_tokens": written[-1]["num_tokens"],
            "seconds": 1.5 * steps,
            "why": "max_steps",
        }
        (folder / "finished.json").write_text(json.dumps(done))
    if not tokens or built is None:
        return folder
    stats = None
    for n in range(rollouts):
        first = 1 + STEPS_PER_RECORD * n
        asked = [
            prompts[(n * groups + g) % len(prompts)] if prompts else f"{n + 7} + {g} = " for g in range(groups)
        ]
        reward = _rewards(rng, groups, size) if rewards is None else rewards(rng, groups, size)
        batch, drawn_at, word, step = _rollout(
            rng, built, first, updates, reward, length, words, stats if adaptive else None
        )
        stats = _record(folder, built, batch, drawn_at, word, step, words, asked, ranks)
    for file in (folder / "tokens").glob("*.parquet") if rows else ():
        table = pq.ParquetFile(file).read()
        pq.write_table(rows(table).replace_schema_metadata(table.schema.metadata), file)
    return folder


def _rewards(rng: np.random.Generator, groups: int, size: int) -> np.ndarray:
    """Zeros and ones, both in every group but the last, which is all wrong."""
    right = rng.random((groups, size)) < 0.5
    right[:, 0], right[:, -1] = True, False
    right[-1] = False
    return right.astype(float)


def _rollout(
    rng: np.random.Generator,
    method: hapo.Method,
    first: int,
    updates: int,
    reward: np.ndarray,
    length: int,
    words: Sequence[str],
    stats: hapo.EntropyStats | None,
) -> tuple[hapo.TokenBatch, torch.Tensor, np.ndarray, torch.Tensor]:
    """A rollout batch, the temperature and the word of each token, and the optimiser step of each response."""
    (groups, size), b = reward.shape, reward.size
    score = torch.tensor(reward.reshape(-1), dtype=torch.float32)
    lengths = np.minimum(length, rng.integers(max(2, length // 2), length + 1, b) + 2 * (reward.reshape(-1) <= 0))
    word = rng.integers(0, len(words), (b, length))
    typical = np.array([UNCERTAIN.get(w, 0.08) for w in words])[word]
    entropy = torch.tensor(typical * rng.lognormal(0.0, 0.7, typical.shape), dtype=torch.float32)
    old = -entropy * torch.tensor(rng.exponential(1.0, typical.shape), dtype=torch.float32)
    step = first + torch.tensor(rng.permutation(b)) % updates
    moved = torch.tensor(rng.normal(0.0, 1.0, typical.shape), dtype=torch.float32) * (0.05 + 0.15 * entropy)
    drawn_at = torch.ones_like(old)
    if stats is not None and method.temperature_rule is not None:
        drawn_at = method.temperature_rule(entropy, stats)
    sampler = (old * drawn_at + torch.tensor(rng.normal(0, 1e-3, old.shape), dtype=torch.float32)).clamp(max=0.0)
    batch = hapo.TokenBatch(
        mask=torch.arange(length)[None, :] < torch.tensor(lengths)[:, None],
        old_logp=old,
        logp=torch.where((step > first)[:, None], old + moved, old).clamp(max=0.0),
        sampler_logp=sampler,
        ref_logp=old + 0.1 * moved if method.penalty else None,
        old_entropy=entropy,
        entropy=entropy * torch.exp(0.1 * moved),
        reward=score,
        verdict=(score > 0).float(),
        group=torch.arange(groups).repeat_interleave(size),
    )
    return batch, drawn_at, word, step


def _record(
    folder: Path,
    method: hapo.Method,
    batch: hapo.TokenBatch,
    drawn_at: torch.Tensor,
    word: np.ndarray,
    step: torch.Tensor,
    words: Sequence[str],
    asked: Sequence[str],
    ranks: int,
) -> hapo.EntropyStats | None:
    """Train on the batch as an engine does, and write what it records; the statistics of the batch."""
    measured = {name: getattr(batch, name) for name in ("old_logp", "old_entropy", "sampler_logp", "ref_logp")}
    prepared, first = method.prepare(batch).replace(**measured), int(step.min())
    records = [RunRecords(folder, rank) for rank in range(ranks)]
    for now in step.unique().tolist():
        trained = (step == now).nonzero().squeeze(1)
        whole = method.step(prepared.rows(trained))
        for rank, record in enumerate(records):
            mine = (batch.group[trained] % ranks == rank).nonzero().squeeze(1)
            index, rows = trained[mine], whole.rows(mine)
            record.add_tokens(
                step=now,
                rollout=first,
                batch=rows,
                made=method.loss(rows).tokens,
                mask=batch.mask[index],
                response=index,
                responses=len(batch),
                ids=torch.tensor(word)[index],
                texts=[[words[i] for i in row] for row in word[index.numpy()]],
                prompts=[asked[g] for g in batch.group[index].tolist()],
                temperature=drawn_at[index],
            )
            record.write_tokens(now)
    return prepared.stats


def _metrics(
    rng: np.random.Generator, step: int, steps: int, length: int, method: hapo.Method | None, adaptive: bool
) -> dict[str, Any]:
    done, noise = step / max(steps, 1), rng.normal(0, 0.03)
    reward = 0.2 + 0.5 * (1 - math.exp(-2 * done)) + noise
    mean_length = length * (0.8 - 0.1 * done) + rng.normal()
    line: dict[str, Any] = {
        "step": step,
        "epoch": 0.01 * step,
        "loss": float(rng.normal(0, 0.004)),
        "grad_norm": 1.5 + abs(float(rng.normal(0, 0.4))),
        "learning_rate": 3e-5,
        "num_tokens": 400.0 * step,
        "reward": reward,
        "reward_std": math.sqrt(max(reward * (1 - reward), 0.0)),
        "frac_reward_zero_std": 0.2 + 0.2 * done,
        "rewards/addition_reward/mean": reward,
        "rewards/addition_reward/std": 0.4,
        "entropy": 0.5 * math.exp(-done) + abs(noise) / 5,
        "completions/mean_length": mean_length,
        "completions/min_length": 0.5 * length,
        "completions/max_length": float(length),
        "completions/clipped_ratio": 0.02,
        "step_time": 1.5,
        "wall_seconds": 1.5 * step,
    }
    if method is None:
        return line
    line |= {
        "completions/mean_length_right": mean_length - 1.0,
        "completions/mean_length_wrong": mean_length + 2.0,
        "clip_ratio/low_mean": 0.004 + abs(noise) / 20,
        "clip_ratio/high_mean": 0.002 + abs(noise) / 30,
        "ratio/mean": 1.0 + noise / 50,
        "kl_old": 1e-3 + noise**2,
        "sampler_weight/mean": 1.0 + noise / 20,
        "sampling/sampling_logp_difference/mean": 0.004 + abs(noise) / 50,
        "sampling/sampling_logp_difference/max": 0.3,
        "groups/used": 0.8 - 0.2 * done,
        "time/generate": 0.6,
        "time/reward": 0.05,
        "time/score": 0.2,
        "time/update": 0.5,
    }
    if method.penalty:
        line["kl"] = 2e-3 * done
    if method.stats is not None:
        line |= {"entropy_stats/pivot": -2.2, "entropy_stats/sigma": 0.7, "entropy_stats/floored": 0.0}
    if adaptive and step > 2:
        line |= {"temperature/mean": 0.97, "temperature/min": 0.9, "temperature/max": 1.1}
    return line


def _write_evaluations(folder: Path, rng: np.random.Generator, written: list[dict[str, Any]]) -> None:
    problems = 40
    with (folder / "evaluations.jsonl").open("w") as file:
        for step in sorted({0, len(written) // 2, len(written)}):
            for how, samples in (("greedy", 1), ("sampled", 4)):
                chance = 0.3 + 0.4 * step / max(len(written), 1)
                scores = rng.binomial(samples, chance, problems) / samples
                mean = float(scores.mean())
                half = 1.96 * math.sqrt(max(mean * (1 - mean), 0.01) / problems)
                line = {
                    "step": step,
                    "num_tokens": 400.0 * step,
                    "seconds": 1.5 * step,
                    "how": how,
                    "mean": mean,
                    "low": max(mean - half, 0.0),
                    "high": min(mean + half, 1.0),
                    "problems": problems,
                    "samples": samples,
                    "binary": True,
                    "scores": scores.tolist(),
                }
                file.write(json.dumps(line) + "\n")


def _write_config(
    folder: Path,
    method: str | None,
    options: dict[str, Any],
    seed: int,
    changes: dict[str, Any],
    size: int,
    updates: int,
    length: int,
) -> None:
    config: dict[str, Any] = {
        "dataset": "addition",
        "model_name_or_path": "tiny",
        "output_dir": folder.name,
        "learning_rate": 3e-5,
        "seed": seed,
        "num_generations": size,
        "steps_per_generation": updates,
        "max_completion_length": length,
        "run_records": True,
    }
    if method is not None:
        config |= {"method": method, "method_options": options}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | changes, sort_keys=False, allow_unicode=True))


def _write_manifest(folder: Path, seed: int, changes: dict[str, Any], ranks: int) -> None:
    manifest = {
        "created": "2026-11-23T12:03:49Z",
        "command": ["hapo", "train", "--output_dir", folder.name, "--seed", str(seed)],
        "python": "3.11.7",
        "machine": {"platform": "Linux", "cores": 2, "threads": 1},
        "versions": {"hapo": hapo.__version__, "torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0"},
        "seed": seed,
        "model": "tiny",
        "weights_sha256": "9f7119b335f0441904368ceac6b33ededacf5f60ce0fdf0ead36b25a42f9e3c0",
        "data_fingerprint": "a36d2b5838126d80",
        "processes": ranks,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | changes, indent=2))


@pytest.fixture(name="make_run", scope="session")
def _make_run() -> Callable[..., Path]:
    """`make_run(folder, method="hapo", ...)`: see the function."""
    return make_run
