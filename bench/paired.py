"""What both benchmarks share: seconds of one run, the summary of paired ratios, the machine."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch


def seconds(run: Callable[[], object], device: str = "cpu") -> tuple[float, float]:
    """Of this process's processors and by the wall; on CUDA both are the time between two events."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return (start.elapsed_time(end) / 1e3,) * 2
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def commit() -> str | None:
    """Of the repository around this file, with "-dirty" where tracked files differ; None in a copy without one."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(describe, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def machine(device: str = "cpu", packages: tuple[str, ...] = ("torch",)) -> dict[str, object]:
    """Processor or GPU, threads, load at this moment, versions, commit."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "processor": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "commit": commit(),
        **{name: version(name) for name in packages},
    }
