"""Runs of the stock `python -m verl.trainer.main_ppo` on CPU, each in a folder of its own, under a hard time-out."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VERL_USE_EXTERNAL_MODULES": "hapo.verl_cpu"}

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.verl.inputs import make_inputs
from tests.verl.launch import BY_TOKEN, HAPO, STAPO, WITHOUT_QUEUE, VerlRun, launch


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, prompts, and a reward for digits."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def begun(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, VerlRun]]:
    """The runs that every test reads, begun at the same time: most of a run is the start of its processes."""
    runs = {
        "hapo": launch(inputs, tmp_path_factory.mktemp("hapo"), *HAPO),
        "stapo": launch(inputs, tmp_path_factory.mktemp("stapo"), *STAPO, ranks=2),
    }
    yield runs
    for run in runs.values():
        run.kill()


@pytest.fixture(scope="session")
def hapo_run(begun: dict[str, VerlRun]) -> VerlRun:
    """hapo on one rank, whole."""
    return begun["hapo"].wait()


@pytest.fixture(scope="session")
def stapo_run(begun: dict[str, VerlRun]) -> VerlRun:
    """stapo on two ranks."""
    return begun["stapo"].wait()


@pytest.fixture(scope="session")
def by_token_run(
    begun: dict[str, VerlRun], inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VerlRun]:
    """hapo without verl's queue, on scores by token; after the others: three at once are short of memory."""
    for other in begun.values():
        other.end()
    run = launch(inputs, tmp_path_factory.mktemp("by_token"), *BY_TOKEN, module=WITHOUT_QUEUE)
    yield run.wait()
    run.kill()
