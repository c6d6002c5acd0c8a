"""The report: one page that loads nothing, from few records or many, whatever is written in them."""

from __future__ import annotations

import json
import re
import warnings
from html.parser import HTMLParser
from urllib.parse import parse_qs

import pandas as pd
import pytest

from hapo.cli import UsageError
from hapo.cli.report import main
from hapo.insight import report
from hapo.insight.figures import Figure
from hapo.insight.page import new_nonce, render
from hapo.insight.report import write_figures, write_report
from hapo.insight.run import Run, recompute

HOSTILE = (
    "<script>window.hacked=1</script>",
    "</script><script>window.hacked=2</script>",
    "\"'><img src=x onerror=window.hacked=3>",
    "{{ 7919 * 7907 }}",
    "‮reversed",
    "👩‍🚀",
    "\x00",
    "w" * 10_000,
    " ",
)


class Page(HTMLParser):
    """What a browser would make of a page, as far as the tests look."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.data: list[object] = []
        self.open = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open = tag

    def handle_endtag(self, tag):
        self.open = ""

    def handle_data(self, data):
        if self.open == "script" and self.tags[-1][1].get("type") == "application/json":
            self.data.append(json.loads(data))
        elif self.open not in ("script", "style"):
            self.words.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.tags if name == tag and attributes.items() <= found.items()]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def page_of(file) -> Page:
    return Page(file.read_text(encoding="utf-8"))


def checked(page: Page) -> Page:
    """The page runs nothing but its own scripts and names nothing outside itself."""
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    nonce = re.fullmatch(
        r"default-src 'none'; script-src 'nonce-([\w-]{22})'; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'",
        policy,
    )[1]
    for tag in page.all("script"):
        assert tag.get("nonce") == nonce or not tag.get("type", "").endswith(("javascript", "module"))
    for tag, attributes in page.tags:
        assert tag in KNOWN, tag
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("href", "#").startswith("#") and "src" not in attributes
    return page


KNOWN = {
    *("html", "head", "meta", "title", "style", "script", "noscript", "body", "main", "header", "footer", "nav"),
    *("section", "div", "span", "p", "a", "h1", "h2", "h3", "h4", "ul", "ol", "li", "dl", "dt", "dd", "br", "bdi"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td", "strong", "mark", "code", "kbd", "small"),
    *("figure", "figcaption", "details", "summary", "fieldset", "legend", "label", "input", "button", "select"),
    *("option", "output", "aside", "dialog", "canvas", "form", "i", "b", "template"),
}


@pytest.fixture(scope="module")
def folder(make_run, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "mine", groups=8, size=8)


@pytest.fixture(scope="module")
def whole(folder):
    return checked(page_of(write_report([folder], folder / "report.html")))


def test_a_page_has_its_sections_and_every_figure(whole):
    sections = [tag["id"] for tag in whole.all("section")]
    assert sections == ["outcome", "curves", "tokens", "pushes", "microscope"]
    assert all(whole.all("a", href=f"#{name}") for name in sections)
    figures = [tag["id"] for tag in whole.all("figure") if "id" in tag]
    assert {"reward", "accuracy", "run-1-dual-entropy", "run-1-clipping"} <= set(figures)
    assert len(set(figures)) == len(figures)
    assert "left out" not in whole.text


def test_the_head_says_what_was_run_and_what_came_of_it(whole, folder):
    run = Run(folder)
    first, *_, last = run.evaluations[run.evaluations["how"] == "greedy"].itertuples()
    assert f"{100 * first.mean:.1f} % → {100 * last.mean:.1f} %" in whole.text
    assert f"{100 * last.low:.1f} % to {100 * last.high:.1f} %" in whole.text
    assert "hapo on addition, 24 optimiser steps in 36 s; ended at its last step" in whole.text
    assert "hapo, options at their defaults" in whole.text
    assert "hapo train --output_dir mine --seed 0" in whole.text


def test_options_that_differ_are_named(make_run, tmp_path):
    folder = make_run(tmp_path / "run", options={"components": "AB", "eps_high": 0.28}, rollouts=1)
    assert "hapo (components AB)" in page_of(write_report([folder], tmp_path / "page.html")).text


def test_tables_hold_the_greatest_pushes_and_link_to_their_tokens(whole, folder):
    run = Run(folder)
    table = pd.concat(
        run.tokens(first).assign(push=recompute(run.rollout(first), run.method())["push"])
        for first in run.rollouts
    )
    for pick in ("max", "min"):
        row = table.iloc[getattr(table["push"].to_numpy(), f"arg{pick}")()]
        link = next(
            place
            for tag in whole.all("a")
            if tag["href"].startswith("#microscope?")
            and (place := {k: v[0] for k, v in parse_qs(tag["href"].split("?")[1]).items()})
            and int(place["rollout"]) == row["rollout"]
            and int(place["response"]) == row["response"]
            and int(place["position"]) == row["position"]
        )
        assert link["run"] == "mine" and int(link["step"]) == row["step"]
        assert f"{row['push']:+#.3g}".replace("-", "−") in whole.text


def test_suppressed_tokens_of_right_and_wrong_answers_can_be_chosen(whole):
    assert [tag["value"] for tag in whole.all("input", name="among")] == ["all", "wrong", "right"]
    assert [tag["data-among"] for tag in whole.all("div") if "data-among" in tag] == ["all", "wrong", "right"]


@pytest.mark.parametrize(
    "quirks",
    [
        {"steps": 0, "tokens": False, "evaluations": False, "finished": False},
        {"steps": 1, "tokens": False, "evaluations": False, "finished": False},
        {"steps": 1, "rollouts": 1, "updates": 1, "groups": 1, "size": 2, "length": 2},
        {"temperature": False},
        {"method": "dapo"},
        {"method": "gspo"},
        {"method": "cispo"},
        {"method": "grpo", "options": {"kl_coef": 0.1}},
        {"method": None},
    ],
    ids=str,
)
def test_few_records_make_a_page_that_says_what_is_missing(quirks, make_run, tmp_path):
    page = checked(page_of(write_report([make_run(tmp_path / "run", **quirks)], tmp_path / "page.html")))
    assert re.search(r"\d+ figures? left out", page.text)


def test_a_run_without_a_word_of_the_manifest_and_a_method_of_ones_own(make_run, tmp_path):
    folder = make_run(tmp_path / "run", config={"method": "mine"}, rollouts=1)
    (folder / "manifest.json").unlink()
    page = checked(page_of(write_report([folder], tmp_path / "page.html")))
    assert "the method cannot be rebuilt: there is no method 'mine'" in page.text


def test_runs_are_overlaid_and_told_apart(make_run, tmp_path):
    folders = [make_run(tmp_path / place / "run", method) for place, method in (("a", "hapo"), ("b", None))]
    page = checked(page_of(write_report(folders, tmp_path / "page.html")))
    assert "2 runs" in page.text and "whether two runs differ is for hapo compare to say" in page.text
    assert all(str(folder) in page.text for folder in folders)
    assert [tag["id"] for tag in page.all("figure", id="run-1-clipping")] and not page.all(
        "figure", id="run-2-clipping"
    )


def test_whatever_is_written_in_a_run_stays_text(make_run, tmp_path):
    options = {"options": {"components": "AB"}, "prompts": HOSTILE, "words": HOSTILE, "groups": 8, "size": 4}
    every = "".join(HOSTILE).replace("\x00", "")
    folder = make_run(
        tmp_path / "<script>window.hacked=4<",
        config={"dataset": every, "model_name_or_path": every, "learning_rate": every},
        manifest={"command": HOSTILE, "versions": {word: word for word in HOSTILE}, "seed": every},
        lines=lambda line: line | {f"{word}/metric": 1.0 for word in HOSTILE},
        **options,
    )
    page = checked(page_of(write_report([folder, folder], tmp_path / "page.html")))
    for word in ("<script>window.hacked=1</script>", "{{ 7919 * 7907 }}", "onerror=window.hacked=3>"):
        assert word in page.text
    assert "7919 * 7907" in page.text and "62615533" not in page.text


def test_a_folder_whose_name_is_no_unicode(make_run, tmp_path):
    folder = make_run(tmp_path / "a\udcffb", None)
    assert "a?b" in page_of(write_report([folder], tmp_path / "page.html")).text


def test_three_runs_of_ten_thousand_steps_stay_small(make_run, tmp_path, monkeypatch):
    folders = [make_run(tmp_path / name, steps=10_000, seed=n) for n, name in enumerate("abc")]
    monkeypatch.setattr(report, "microscope", lambda *args, **options: "")
    assert write_report(folders, tmp_path / "page.html").stat().st_size < 3_000_000


def test_nonces_differ_and_a_page_without_figures_has_no_vega(whole):
    assert new_nonce() != new_nonce()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html = render("page.html", title="<b>", nonce="n", figures=[Figure("a", "A", "Look.", missing="Run it.")])
    assert "&lt;b&gt;" in html and len(html) < 20_000


def test_a_page_is_written_in_one_piece(folder, tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("old")
    monkeypatch.setattr(report, "render", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report([folder], tmp_path / "page.html", replace=True)
    assert (tmp_path / "page.html").read_text() == "old"


def test_figures_are_written_as_files_those_of_tokens_a_run_each(make_run, tmp_path):
    folders = [make_run(tmp_path / "run", rollouts=1), make_run(tmp_path / "trl", None, steps=2)]
    written = write_figures(folders, tmp_path / "figures", "svg")
    names = {file.name for file in written}
    assert {"reward.svg", "accuracy.svg", "clipping-1.svg"} <= names and "clipping-2.svg" not in names
    assert all(file.read_text(encoding="utf-8").startswith("<svg") for file in written)


@pytest.mark.parametrize(
    ("folders", "message"), [([], "needs the folder of a run"), (["none"], "none is no run folder")]
)
def test_a_report_of_nothing_is_refused(folders, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        write_report(folders, tmp_path / "page.html")


def test_the_command_writes_into_the_run_and_elsewhere_when_told(make_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a", rollouts=1)
    make_run(tmp_path / "b", None, steps=1, evaluations=False)
    assert main(["a"]) == 0 and (tmp_path / "a" / "report.html").is_file()
    assert main(["b", "a", "--output", "c.html", "--against", "dapo", "--rollouts", "1"]) == 0
    assert main(["b", "b", "--png", "figures"]) == 0
    assert (tmp_path / "report.html").is_file() and (tmp_path / "figures" / "reward.png").is_file()
    out = capsys.readouterr().out
    assert "report: c.html" in out and "figures: figures" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none is no run folder: it has no config.yaml"),
        (["a", "--output", "nowhere/page.html"], "--output must be an .html file in a folder that exists"),
        (["a", "--output", "a"], "--output must be an .html file in a folder that exists"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(arguments, message, make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a", rollouts=1)
    with pytest.raises(UsageError, match=re.escape(message)):
        main(arguments)


def test_an_unknown_method_to_compare_with_is_named(make_run, tmp_path):
    folder = make_run(tmp_path / "a", rollouts=1)
    with pytest.raises(ValueError, match="dappo"):
        main([str(folder), "--against", "dappo"])
    assert not (folder / "report.html").exists()
