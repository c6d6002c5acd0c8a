"""Commands, methods and their messages."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields

import pytest

import hapo
from hapo.cli import main
from hapo.cli.methods import defaults, differences, option_docs
from hapo.methods import AdaptiveTemperature, options_of


def test_help_lists_every_command_on_one_line(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[4:]] == [
        "train",
        "eval",
        "report",
        "compare",
        "doctor",
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
        assert f" {name} {paper.year} {paper.arxiv} " in text
    assert "no KL stages: filter, bounds, reduce, no penalty filter_groups=True, eps_high=0.28 dr_grpo" in text
    assert "stages: the reference of this list kl_coef=0.04, scale=True," in text
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
    for stage, choice in {**cls.stages, **differences(cls)}.items():
        assert [f"{stage} *" if stage in differences(cls) else stage, choice] in rows
    for option, value in defaults(cls).items():
        shown = "{'tau': 0.1}" if isinstance(value, AdaptiveTemperature) else repr(value)
        assert [option, shown, option_docs(cls)[option]] in rows
    for f in fields(AdaptiveTemperature):
        assert [f.name, repr(f.default), option_docs(AdaptiveTemperature)[f.name]] in rows


def test_every_option_of_every_method_is_described():
    for name in hapo.methods():
        cls = options_of(name)
        assert {f.name for f in fields(cls)} == set(option_docs(cls)) == set(defaults(cls)), name
        assert all(option_docs(cls).values())


def test_an_unknown_method_names_the_nearest(capsys):
    assert main(["methods", "happo"]) == 2
    assert "there is no method 'happo'; did you mean 'hapo'?" in capsys.readouterr().err


def test_listing_methods_loads_no_engine():
    code = (
        "import sys; from hapo.cli import main; main(['methods', 'hapo']); "
        "print({'trl', 'transformers', 'datasets'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "set()"
