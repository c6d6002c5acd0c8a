"""What `hapo report` takes of large records: memory, processor seconds, the page; an older checkout in turns.

    python -m bench.report_scale --folder /tmp/4m --batches 4 --pairs 3 --against ../older --browser \\
        --output bench/results/report_scale_4m.json
    python -m bench.report_scale --folder /tmp/41m --batches 40 --browser \\
        --output bench/results/report_scale_41m.json

A synthetic run folder is written by `hapo.engines.records`, one rollout batch at a time, unless it is there: HAPO
on `--rows` answers of `--tokens` tokens, in groups of 8, four optimiser steps for each rollout batch, 8 rows in a
micro-batch. Token texts are a Zipf law over 20,000 made words, entropies are log-normal about a typical value of
each word, rewards are 0 and 1. Every column holds noise, which compresses worse than a real run.

Each report is a process of its own: peak resident memory and processor seconds, children included, as wait4 tells.
Rounds of contenders run A B, B A, ...; the files are read once before, so that none pays for the disk. `--browser`
opens the page in headless Chromium, offline: seconds from the request until the microscope is open and a task
behind it has run, as an input's would (by the page's own clock: Playwright hears of it a second later); and the
processor's seconds of the page's main thread until a second after Playwright has heard.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

import hapo
from hapo.engines.records import RunRecords, append_line, manifest

from .paired import machine, summary

ROOT = Path(__file__).parents[1]
GROUP, UPDATES, MICRO, EVERY = 8, 4, 8, 40
"""Answers to a prompt; optimiser steps of a rollout batch; rows of a micro-batch; steps between records."""
WORDS = 20_000


def vocabulary(rng: np.random.Generator) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts, their probabilities, their typical entropies (nats)."""
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    texts = {" the", "The", "\n", "\n\n", " wait", " so", "=", "+", "7"}
    while len(texts) < WORDS:
        word = "".join(rng.choice(letters, rng.integers(2, 9)))
        texts.add(str(rng.choice(["", " ", " "])) + (word.capitalize() if rng.random() < 0.1 else word))
    p = 1 / np.arange(10, WORDS + 10) ** 1.05
    return sorted(texts, key=len), p / p.sum(), np.exp(rng.normal(-2.5, 1.5, WORDS))


def write_run(folder: Path, batches: int, rows: int, tokens: int) -> None:
    """The run folder, with one rollout batch in memory at a time."""
    rng = np.random.default_rng(0)
    method = hapo.method("hapo")
    config = {"method": "hapo", "method_options": {}, "max_completion_length": tokens, "num_generations": GROUP}
    RunRecords.create(folder, config, manifest(seed=0, model="made by bench.report_scale"))
    texts, p, typical = vocabulary(rng)
    for step in range(1, EVERY * batches + 1):
        line = {"step": step, "loss": rng.normal(0, 0.01), "reward": 0.5, "entropy": 0.4, "num_tokens": 1e5 * step}
        append_line(folder / "metrics.jsonl", line | {"wall_seconds": 60.0 * step})
    stats = None
    for number in range(batches):
        stats = _write_batch(folder, rng, method, 1 + EVERY * number, rows, tokens, (texts, p, typical), stats)
    (folder / "finished.json").write_text(json.dumps({"steps": EVERY * batches, "why": "max_steps"}))


def _write_batch(
    folder: Path,
    rng: np.random.Generator,
    method: hapo.Method,
    first: int,
    rows: int,
    tokens: int,
    words: tuple[list[str], np.ndarray, np.ndarray],
    stats: hapo.EntropyStats | None,
) -> hapo.EntropyStats | None:
    """Make a rollout batch, train on it as an engine does, and write what it records."""
    texts, p, typical = words
    shape = rows, tokens
    noise = torch.Generator().manual_seed(first)
    id_ = torch.from_numpy(np.searchsorted(p.cumsum(), rng.random(shape)).clip(max=WORDS - 1))
    entropy = torch.from_numpy(typical)[id_].float() * torch.randn(shape, generator=noise).exp()
    old = -entropy * torch.rand(shape, generator=noise).clamp(min=1e-6).log().neg()
    step = first + torch.from_numpy(rng.permutation(rows) % UPDATES)
    moved = torch.randn(shape, generator=noise) * (0.05 + 0.15 * entropy.clamp(max=3))
    drawn_at = torch.ones(shape)
    if stats is not None and method.temperature_rule is not None:
        drawn_at = method.temperature_rule(entropy, stats)
    right = rng.random((rows // GROUP, GROUP)) < rng.beta(1, 1, (rows // GROUP, 1))
    reward = torch.from_numpy(right.reshape(-1).astype(np.float32))
    batch = hapo.TokenBatch(
        mask=torch.ones(shape, dtype=torch.bool),
        old_logp=old,
        logp=torch.where((step > first)[:, None], old + moved, old).clamp(max=0.0),
        sampler_logp=(old * drawn_at + 1e-3 * torch.randn(shape, generator=noise)).clamp(max=0.0),
        old_entropy=entropy,
        entropy=entropy * (0.1 * moved).exp(),
        reward=reward,
        verdict=reward,
        group=torch.arange(rows) // GROUP,
    )
    prepared = method.prepare(batch)
    prompt = "Solve the problem and put the answer in a box. " * 8
    records = RunRecords(folder)
    for now in range(first, first + UPDATES):
        index = (step == now).nonzero().squeeze(1)
        trained = method.step(prepared.rows(index))
        for i in range(0, len(index), MICRO):
            part, micro = index[i : i + MICRO], trained.rows(slice(i, i + MICRO))
            records.add_tokens(
                step=now,
                rollout=first,
                batch=micro.replace(sampler_logp=batch.rows(part).sampler_logp),
                made=method.loss(micro).tokens,
                mask=batch.mask[part],
                response=part,
                responses=rows,
                ids=id_[part],
                texts=[[texts[t] for t in row] for row in id_[part].tolist()],
                prompts=[f"{prompt}Problem {first}.{g}" for g in batch.group[part].tolist()],
                temperature=drawn_at[part],
            )
        records.write_tokens(now)
    return prepared.stats


def report(checkout: Path, folder: Path, page: Path) -> dict[str, float]:
    """One `hapo report` in a process of its own."""
    command = [sys.executable, "-m", "hapo.cli", "report", str(folder), "--output", str(page), "--replace"]
    threads = {"OMP_NUM_THREADS": "1", "ARROW_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment = os.environ | threads | {"PYTHONPATH": str(checkout / "src")}
    began = time.perf_counter()
    child = subprocess.Popen(command, env=environment, cwd="/", stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"hapo report of {checkout} ended with {child.returncode}")
    return {
        "cpu_s": round(used.ru_utime + used.ru_stime, 2),
        "wall_s": round(time.perf_counter() - began, 2),
        "peak_mib": round(used.ru_maxrss / 1024, 1),
        "page_mb": round(page.stat().st_size / 1e6, 2),
        "load": round(os.getloadavg()[0], 2),
    }


ANSWERS = """
new MutationObserver((_, observer) => {
  if (!document.querySelector("#microscope[data-ready]")) return;
  observer.disconnect();
  setTimeout(() => { window.answered = performance.now(); });
}).observe(document, { subtree: true, childList: true, attributeFilter: ["data-ready"] });
"""
"""When the page answers: put into it before its own scripts."""


def opened(page: Path, times: int = 5) -> list[dict[str, float]]:
    """Seconds from the request until the microscope answers; those of the processor in the page's main thread."""
    from playwright.sync_api import sync_playwright

    found = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        for _ in range(times):
            tab = browser.new_context(offline=True, viewport={"width": 1400, "height": 900}).new_page()
            tab.set_default_timeout(120_000)
            tab.add_init_script(ANSWERS)
            tools = tab.context.new_cdp_session(tab)
            tools.send("Performance.enable", {"timeDomain": "threadTicks"})
            began = time.time()
            tab.goto(page.resolve().as_uri(), wait_until="commit")
            tab.wait_for_selector("#microscope[data-ready]", state="attached")
            seconds = tab.evaluate("(performance.timeOrigin + window.answered) / 1000") - began
            tab.wait_for_timeout(1000)
            told = {metric["name"]: metric["value"] for metric in tools.send("Performance.getMetrics")["metrics"]}
            load = round(os.getloadavg()[0], 2)
            found.append(
                {"interactive_s": round(seconds, 3), "cpu_s": round(told["TaskDuration"], 3), "load": load}
            )
            tab.context.close()
        browser.close()
    return found


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """Turns of the contenders over one folder."""
    contenders = {"new": ROOT, **({} if given.against is None else {"old": given.against.resolve()})}
    pages = {name: given.folder.parent / f"{given.folder.name}-{name}.html" for name in contenders}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for file in (given.folder / "tokens").iterdir():
        file.read_bytes()
    for number in range(given.pairs):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            turn = report(contenders[name], given.folder, pages[name])
            print(f"round {number}, {name}: {turn}", flush=True)
            turns[name].append(turn)
    result: dict[str, Any] = {"turns": turns}
    if len(contenders) == 2 and given.pairs > 1:
        ratios = [a["cpu_s"] / b["cpu_s"] for a, b in zip(turns["new"], turns["old"], strict=True)]
        result["cpu_ratio"] = summary(ratios)
    for name, of in turns.items():
        result[name] = {
            key: statistics.median(turn[key] for turn in of) for key in ("cpu_s", "peak_mib", "page_mb")
        }
    if given.browser:
        result["browser"] = {name: opened(page) for name, page in pages.items()}
    for page in pages.values():
        if not given.keep:
            page.unlink()
    return result


def main() -> None:
    """Write the folder, measure, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="the run folder; written unless it is there")
    add("--batches", type=int, default=4, help="recorded rollout batches")
    add("--rows", type=int, default=128, help="answers of each")
    add("--tokens", type=int, default=8000, help="tokens of each answer")
    add("--pairs", type=int, default=1, help="rounds")
    add("--against", type=Path, help="an older checkout")
    add("--browser", action="store_true", help="open the page too")
    add("--keep", action="store_true", help="leave the pages there")
    add("--write-only", action="store_true", help="write the folder alone")
    add("--output", type=Path, help="the .json file")
    given = parser.parse_args()
    if given.browser and shutil.which("chromium") is None:
        parser.error("--browser needs chromium, which `make test-browser` installs")
    if not given.folder.exists():
        began = time.process_time()
        write_run(given.folder, given.batches, given.rows, given.tokens)
        print(f"written in {time.process_time() - began:.0f} processor seconds", flush=True)
    if given.write_only:
        return
    files = [file.stat().st_size for file in (given.folder / "tokens").glob("*.parquet")]
    sizes = {"batches": given.batches, "rows": given.rows, "tokens": given.tokens}
    told = {
        **sizes,
        "recorded": given.batches * given.rows * given.tokens,
        "parquet_mb": round(sum(files) / 1e6, 1),
    }
    result = {"work": told, "machine": machine(packages=("torch", "pyarrow", "pandas")), **measured(given)}
    print(json.dumps({key: value for key, value in result.items() if key != "turns"}, indent=1))
    if given.output is not None:
        given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
