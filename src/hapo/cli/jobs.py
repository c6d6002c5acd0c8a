"""Runs of a comparison, several at once, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from .arms import Job, run_job


def run_all(jobs: list[Job], at_once: int, what: str, console: Console) -> bool:
    """Run what is not done, each in a process of its own; False if any failed."""
    waiting = [job for job in jobs if not job.done]
    failed: list[Job] = []
    context: Any = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    if hasattr(os, "fork"):
        context.set_forkserver_preload(["hapo.cli.arms"])  # the libraries are loaded once
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
                            f"failed: {job.arm.label}, seed {job.seed}: see {job.folder / 'log.txt'}",
                            soft_wrap=True,
                        )
                    finished = len(jobs) - len(waiting) - len(slots)
                    left = (time.monotonic() - began) / (finished - done_before) * (len(waiting) + len(slots))
                    bar.update(task, completed=finished, left=f"{_duration(left)} left")
                    if not console.is_terminal and not failed and (finished == len(jobs) or finished % 10 == 0):
                        console.print(f"{what}: {finished}/{len(jobs)} done, {_duration(left)} left")
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
