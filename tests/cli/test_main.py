"""Commands, methods and their messages."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import hapo
from hapo.cli import cards, main
from hapo.cli.cards import defaults, differences, option_docs
from hapo.companions import COMPANIONS
from hapo.methods import TemperatureOptions, options_of
from tests.insight.conftest import make_run


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def loaded_by(folder: Path, *commands: list[str]) -> tuple[str, set[str]]:
    """What a process of its own prints that runs these commands with this cache, and all that it imported."""
    code = (
        "import contextlib, sys\nfrom hapo.cli import main\n"
        f"for words in {[*commands]!r}:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main(words)\n"
        "print('\\n' + ' '.join(sys.modules))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder), "COLUMNS": "100"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    out, _, modules = run.stdout.rstrip("\n").rpartition("\n")
    return out, set(modules.split())


def test_help_lists_every_command_on_one_line(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[4:]] == [
        "train",
        "sft",
        "eval",
        "report",
        "compare",
        "convert",
        "doctor",
        "curriculum",
        "shape",
        "calibrate",
        "methods",
    ]
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hapo {hapo.__version__}\n"


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "there is no command 'trian'; did you mean train?" in capsys.readouterr().err


def test_the_list_has_paper_stages_and_own_options_of_every_method(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    text = " ".join(" ".join(lines).split())
    for name in hapo.methods():
        paper = options_of(name).paper
        assert f" {name} {hapo.methods()[name]} {paper.year} {paper.arxiv} " in text
    assert "no KL stages: filter, bounds, reduce, no penalty filter_groups=True, eps_high=0.28 dft" in text
    assert "stages: the reference of this list kl_coef=0.04 grpo_s" in text
    assert "temperature={'tau': 0.1}, eps_high=0.28, components='ABCD'," in text


@pytest.mark.parametrize("name", hapo.methods())
def test_a_card_has_stages_options_defaults_and_their_meaning(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["methods", name]) == 0
    out = capsys.readouterr().out
    cls = options_of(name)
    assert f"{cls.paper.title} ({cls.paper.year})\nhttps://arxiv.org/abs/{cls.paper.arxiv}\n" in out
    assert ("by its definition" in out) == bool(hapo.method(name).breaks)
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    differs = differences(name)
    for stage, choice in {**hapo.method(name).stages, **differs}.items():
        assert [f"{stage} *" if stage in differs else stage, choice] in rows
    meaning = option_docs(cls)
    for option, value in defaults(cls).items():
        shown = "{'tau': 0.1}" if isinstance(value, TemperatureOptions) else repr(value)
        assert [option, shown, meaning[option]] in rows
    if cls.kind == "supervised":
        assert f"{name} (supervised): " in out and "temperature" not in out
        return
    meaning = option_docs(TemperatureOptions)
    for f in fields(TemperatureOptions):
        assert [f.name, repr(f.default), meaning[f.name]] in rows


@pytest.mark.parametrize("name", COMPANIONS)
def test_the_list_and_a_card_have_what_stands_beside_the_methods(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    one = COMPANIONS[name]
    assert main(["methods"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f" {name} {one.kind} {one.year} {one.arxiv} {one.summary} {one.use} " in text
    assert main(["methods", name]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{name} ({one.kind}): {one.summary}\n{one.title} ({one.year})\n")
    assert f"https://arxiv.org/abs/{one.arxiv}\n{one.home}; {one.use}\n" in out
    module, _, kind = one.home.rpartition(".")
    options = {"agent": "ETPOConfig"}.get(one.kind, kind)
    known = inspect.signature(getattr(importlib.import_module(module), options)).parameters
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    for option, (default, meaning) in one.options.items():
        assert repr(known[option].default) == default and [option, default, meaning] in rows
    with pytest.raises(ValueError, match=f"'{name}' is no method but an {one.kind}: "):
        hapo.method(name)


def test_every_option_of_every_method_is_described():
    for name in hapo.methods():
        cls = options_of(name)
        assert {f.name for f in fields(cls)} == set(option_docs(cls)) == set(defaults(cls)), name
        assert all(option_docs(cls).values())


def test_an_unknown_method_names_the_nearest(capsys):
    assert main(["methods", "happo"]) == 2
    assert "there is no method 'happo'; did you mean 'hapo'?" in capsys.readouterr().err


def test_the_list_and_a_card_import_no_torch_once_they_are_in_the_cache(tmp_path):
    made, first = loaded_by(tmp_path, ["methods"], ["methods", "hapo"])
    assert "torch" in first and not {"trl", "transformers", "datasets"} & first
    kept, second = loaded_by(tmp_path, ["methods"], ["methods", "hapo"])
    assert "torch" not in second
    assert made == kept and "hapo (policy): " in kept


def test_help_and_the_examination_of_a_run_import_only_what_they_use(tmp_path):
    run = make_run(tmp_path / "run")
    out, modules = loaded_by(tmp_path, ["--help"], ["--version"], ["report", "--help"])
    assert "usage: hapo report" in out
    assert not {"torch", "numpy", "pandas", "altair", "transformers", "trl"} & modules
    out, modules = loaded_by(tmp_path, ["doctor", str(run)])
    assert "1 note\n" in out
    assert not {"torch", "scipy", "altair", "datasets", "transformers", "trl"} & modules


made_once = functools.cache(cards.make_cards)
"""Making them takes longer than all that is tested about them."""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Sources and a cache of their own; how often the cards were made of them."""
    for pattern in cards.SOURCES:
        for file in cards.PACKAGE.glob(pattern):
            copy = tmp_path / "hapo" / file.relative_to(cards.PACKAGE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    calls = []
    monkeypatch.setattr(cards, "PACKAGE", tmp_path / "hapo")
    monkeypatch.setattr(cards, "make_cards", lambda: calls.append(1) or made_once())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


@pytest.mark.parametrize(
    "edited", ["method.py", "methods/dapo.py", "methods/new.py", "parts/keep.py", "cli/cards.py"]
)
def test_cards_are_made_anew_after_an_edit(edited, made):
    first = cards.cards()
    assert cards.cards() == first and len(made) == 1
    with (cards.PACKAGE / edited).open("a") as file:
        file.write("\n")
    assert cards.cards() == first and len(made) == 2
    assert cards.cards() == first and len(made) == 2


@pytest.mark.parametrize(
    "broken",
    [
        lambda text: b"",
        lambda text: text[: len(text) // 2],
        lambda text: b"\xff" + text,
        lambda text: b"[]",
        lambda text: text.partition(b"\n")[0] + b"\n{}",
        lambda text: text.replace(b"entropy", b"nothing"),
    ],
)
def test_a_broken_cache_is_made_anew(broken, made, tmp_path):
    first, (file,) = cards.cards(), (tmp_path / "cache/hapo").iterdir()
    file.write_bytes(broken(file.read_bytes()))
    assert cards.cards() == first and len(made) == 2
    assert cards.cards() == first and len(made) == 2


def test_a_cache_that_cannot_be_written_to_is_no_error(made, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert sorted(cards.cards().methods) == [*hapo.methods()]

    def home():
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    assert sorted(cards.cards().methods) == [*hapo.methods()]
    assert len(made) == 2


@pytest.mark.parametrize(
    "missing", ["rich", "altair"]
)  # imported by the command, and when it has checked its flags
def test_a_missing_package_is_named_with_the_remedy(missing, tmp_path):
    run = make_run(tmp_path / "run")
    code = f"import sys; sys.modules[{missing!r}] = None; from hapo.cli import main; sys.exit(main(sys.argv[1:]))"
    ended = subprocess.run([sys.executable, "-c", code, "report", run], capture_output=True, text=True)
    assert ended.returncode == 1
    assert re.match(f"hapo report: error: .*{missing}.*; install what it needs with: pip install", ended.stderr)
