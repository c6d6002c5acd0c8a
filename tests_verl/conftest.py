"""Runs of the stock `python -m verl.trainer.main_ppo` on CPU, each in a folder of its own, under a hard time-out."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VERL_USE_EXTERNAL_MODULES": "hapo.verl_cpu"}

from collections.abc import Callable
from pathlib import Path

import pytest

from tests_verl.inputs import make_inputs
from tests_verl.launch import VerlRun, launch


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, prompts, and a reward for digits."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., VerlRun]:
    """Runs verl once for each set of overrides."""
    done: dict[tuple[object, ...], VerlRun] = {}

    def get(*overrides: str, ranks: int = 1) -> VerlRun:
        key = (ranks, *overrides)
        if key not in done:
            done[key] = launch(inputs, tmp_path_factory.mktemp("run"), *overrides, ranks=ranks).wait()
        return done[key]

    return get
