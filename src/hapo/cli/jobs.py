"""Runs of a comparison, several at once, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..engines.records import check_writable
from ..insight.finding import counted
from . import UsageError
from .arms import ASIDE, Job, set_aside
from .one_run import run_job


@contextmanager
def alone(folder: Path, command: str) -> Iterator[None]:
    """One process of a command at a time in a folder.

    Raises:
        UsageError: there is another.
    """
    try:
        with FileLock(folder / f".hapo-{command}.lock", timeout=0):
            yield
    except Timeout as error:
        raise UsageError(f"another `hapo {command}` is at work in {folder}") from error


def check_no_run(folder: Path) -> None:
    """Make the folder of several runs.

    Raises:
        UsageError: it is the folder of one run.
        OSError: it cannot be written to.
    """
    if (folder / "manifest.json").exists():
        raise UsageError(f"{folder} is the folder of a run: choose another --output_dir for several")
    check_writable(folder)


def check_jobs(jobs: Iterable[Job], folder: Path, why: str, ignoring: Collection[str] = ()) -> None:
    """Find out whether something lies where runs are to go that is none of these runs.

    Args:
        jobs: that are asked for.
        folder: of the comparison.
        why: what this call changed for all arms; empty where it changed nothing.
        ignoring: what may differ.

    Raises:
        UsageError: finished runs that differ, with what; or a folder that is no run of a comparison.
    """
    differing: dict[str, list[Job]] = {}
    for job in jobs:
        if job.finished and (words := job.difference(ignoring)):
            differing.setdefault(words, []).append(job)
        elif not job.ours and _holds_anything(job.folder):
            raise UsageError(
                f"{job.folder} is no run of a comparison: choose another --output_dir, or move it aside with "
                "--replace"
            )
    if differing:
        words, some = next(iter(differing.items()))
        runs = f"{counted(len(some), 'finished run')}, {some[0].folder}{' the first,' if len(some) > 1 else ','}"
        reason = f" ({why})" if why and "max_num_gen_batches" in words else ""
        raise UsageError(
            f"not what is asked for: {runs} with {words}{reason}. Nothing was changed: choose another "
            f"--output_dir, or train anew what differs with --replace, which moves the old to {folder / ASIDE}"
        )


def make_room(jobs: Iterable[Job], folder: Path, why: str, replace: bool, console: Console) -> None:
    """Move aside what lies where runs are to begin: stopped tries, and with `replace` all that was not asked for.

    Raises:
        UsageError: see `check_jobs`; a file where a folder is to be. Nothing is moved.
    """
    waiting = [job for job in jobs if not job.done]
    for parent in {parent for job in waiting for parent in job.folder.parents}:
        if os.path.lexists(parent) and not parent.is_dir():
            raise UsageError(f"{parent} is there and no folder: choose another --output_dir")
    if not replace:
        check_jobs(waiting, folder, why)
    moved = [set_aside(job.folder, folder) for job in waiting if _holds_anything(job.folder)]
    if moved:
        console.print(f"moved aside, to {folder / ASIDE}: {counted(len(moved), 'earlier run')}", soft_wrap=True)


def _holds_anything(folder: Path) -> bool:
    """Whatever it is, but for what a kill left of a file that was being written."""
    if not folder.is_dir():
        return os.path.lexists(folder)
    return any(file.suffix != ".partial" for file in folder.iterdir())


def run_all(jobs: list[Job], at_once: int, what: str, console: Console) -> bool:
    """Run what is not done, each in a process of its own; False if any failed."""
    waiting = [job for job in jobs if not job.done]
    failed: list[Job] = []
    context: Any = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    if hasattr(os, "fork"):
        context.set_forkserver_preload(["hapo.cli.preload"])  # the libraries are loaded once
    slots: dict[int, tuple[BaseProcess, Job]] = {}
    gpus = find_gpus()
    began, done_before = time.monotonic(), len(jobs) - len(waiting)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=len(jobs), completed=done_before, left="")
        try:
            while waiting or slots:
                while waiting and len(slots) < at_once:
                    slot = next(i for i in range(at_once) if i not in slots)
                    job = waiting.pop(0)
                    device = gpus[slot % len(gpus)] if gpus else None
                    process = context.Process(target=run_job, args=(job, device))
                    process.start()
                    slots[slot] = process, job
                wait([process.sentinel for process, _ in slots.values()])
                for slot, (process, job) in list(slots.items()):
                    if process.is_alive():
                        continue
                    process.join()
                    del slots[slot]
                    if not job.done:
                        failed.append(job)
                        console.print(
                            f"failed: {job.name}: see {job.folder / 'log.txt'}",
                            soft_wrap=True,
                        )
                    finished = len(jobs) - len(waiting) - len(slots)
                    left = (time.monotonic() - began) / (finished - done_before) * (len(waiting) + len(slots))
                    bar.update(task, completed=finished, left=f"{_duration(left)} left")
                    if not console.is_terminal and job.done:
                        line = f"{what}: {finished} of {len(jobs)}, {job.name}"
                        rest = f"; {_duration(left)} left" if finished < len(jobs) else ""
                        console.print(line + rest, soft_wrap=True)
        except KeyboardInterrupt:
            for process, _ in slots.values():
                process.terminate()
            console.print("stopped; the same command goes on: finished runs stay, the others begin again")
            raise
    return not failed


def find_gpus() -> list[str]:
    """The devices of this process, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    allotted = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return allotted.split(",")[:count] if allotted else [str(n) for n in range(count)]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min"
        if minutes
        else "under a minute"
    )
