"""Commands, methods and their messages."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import hapo
from hapo.cli import main
from hapo.cli.methods import option_docs
from hapo.methods import options_of


def test_help_lists_every_command_on_one_line(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[4:]] == ["train", "eval", "methods"]
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hapo {hapo.__version__}\n"


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "there is no command 'trian'; did you mean train?" in capsys.readouterr().err


def test_methods_are_listed_with_year_and_paper(capsys):
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    for name in hapo.methods():
        assert name in out
        assert options_of(name).paper.arxiv in out


def test_a_card_has_stages_options_defaults_and_their_meaning(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["methods", "hapo"]) == 0
    out = capsys.readouterr().out
    assert "https://arxiv.org/abs/2509.16591" in out
    assert "token-level group z-score" in out
    assert "clamped to [t_min, t_max]" in out
    (rho,) = (line for line in out.splitlines() if line.strip().startswith("rho "))
    assert rho.rstrip().split(maxsplit=2) == ["rho", "0.8", "Quantile of log entropy that is the pivot (paper)."]


def test_every_option_of_every_method_is_described():
    for name in hapo.methods():
        cls = options_of(name)
        assert {f.name for f in fields(cls)} == set(option_docs(cls)), name


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
