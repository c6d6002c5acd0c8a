"""The report as a reader meets it: in a browser, without a network."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from hapo.insight.report import write_report
from tests.browser.conftest import Opened
from tests.insight.conftest import make_run
from tests.insight.test_report import HOSTILE

Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "mine", groups=8, size=8)
    return write_report([folder], folder / "report.html")


def drawn(page: Page) -> None:
    """Wait until every figure in an open part of the page is drawn."""
    page.wait_for_function(
        """() => [...document.querySelectorAll("figure > .plot")]
        .every((plot) => plot.offsetParent === null || plot.querySelector("svg .mark-group"))"""
    )


@pytest.mark.parametrize(("scheme", "width"), [("light", 1400), ("dark", 380)])
def test_every_figure_is_drawn_in_its_column(report: Path, open_page: Open, scheme: str, width: int) -> None:
    page = open_page(report, color_scheme=scheme, viewport={"width": width, "height": 900}).page
    drawn(page)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.evaluate(
        """[...document.querySelectorAll("figure > .plot > svg")]
        .filter((svg) => svg.getBoundingClientRect().width > svg.closest("figure").clientWidth + 1).length"""
    )
    assert wide == 0


def test_the_toggle_changes_the_page_and_its_figures(report: Path, open_page: Open) -> None:
    page = open_page(report, color_scheme="light").page
    drawn(page)
    chart, body = page.locator("#reward svg.marks"), "getComputedStyle(document.body).backgroundColor"
    expect(chart).to_have_css("background-color", page.evaluate(body))
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    expect(page.locator("#reward svg.marks")).to_have_css("background-color", page.evaluate(body))
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_figure_saves_itself(report: Path, open_page: Open) -> None:
    page = open_page(report).page
    drawn(page)
    figure = page.locator("figure#accuracy")
    for label, kind in (("PNG", "png"), ("SVG", "svg")):
        figure.hover()
        if not figure.get_by_text(f"Save as {label}").is_visible():
            figure.locator("summary").click()
        with page.expect_download() as download:
            figure.get_by_text(f"Save as {label}").click()
        assert download.value.suggested_filename == f"accuracy.{kind}"
        assert Path(download.value.path()).stat().st_size > 5_000


def test_resting_on_a_figure_shows_its_numbers(report: Path, open_page: Open) -> None:
    page = open_page(report).page
    drawn(page)
    page.locator("#reward .plot").hover()
    box = page.locator("#reward .mark-symbol path").last.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
    tip = page.locator("#vg-tooltip-element")
    expect(tip).to_contain_text("mine")
    expect(tip).to_contain_text("step")
    assert "undefined" not in tip.inner_text()


def test_folded_figures_are_drawn_when_they_are_opened(report: Path, open_page: Open) -> None:
    page = open_page(report).page
    more = page.get_by_text(re.compile("Everything else that was logged"))
    more.click()
    drawn(page)
    expect(page.locator("figure#other-0 svg").first).to_be_visible()


def test_tables_change_with_the_answers_chosen(report: Path, open_page: Open) -> None:
    page = open_page(report).page
    shown = page.locator("#pushes table:visible")
    expect(shown).to_have_count(2)
    page.get_by_role("radio", name="wrong answers").check()
    expect(shown).to_have_count(2)
    assert set(shown.locator("tbody td:nth-child(3)").all_inner_texts()) <= {"wrong", ""}


def test_a_link_of_the_tables_opens_its_token(report: Path, open_page: Open) -> None:
    page = open_page(report).page
    link = page.locator("#pushes table:visible a").first
    token = link.locator("xpath=ancestor::tr").locator("mark").inner_text()
    expect(page.locator("figure > .plot:not(:has(svg))")).to_have_count(0)  # what is drawn above moves the link
    link.click()
    expect(page.locator("#mx-token")).to_contain_text(token.replace("␣", " ").strip().split("↵")[0])
    expect(page.locator("#microscope")).to_be_in_viewport()


def test_whatever_is_written_in_a_run_runs_nothing(tmp_path: Path, open_page: Open) -> None:
    folder = make_run(
        tmp_path / "<img src=x onerror=window.hacked=4>",
        words=HOSTILE,
        prompts=HOSTILE,
        groups=8,
        manifest={"command": HOSTILE, "versions": {word: word for word in HOSTILE}},
        lines=lambda line: line | {f"{word}/metric": 1.0 for word in HOSTILE},
    )
    page = open_page(write_report([folder, folder], tmp_path / "page.html")).page
    page.get_by_text(re.compile("Everything else that was logged")).click()
    drawn(page)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 1400


def test_an_injected_script_does_not_run(report: Path, open_page: Open) -> None:
    opened = open_page(report)
    for injection in (
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.hacked=1>')",
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 2'}))",
    ):
        with opened.page.expect_console_message(lambda message: "Content Security Policy" in message.text):
            opened.page.evaluate(injection)
    assert opened.page.evaluate("window.hacked") is None
    opened.complaints.clear()  # the browser reports what the policy kept out
    opened.requests[1:] = []


def test_a_page_of_a_baseline_opens(tmp_path: Path, open_page: Open) -> None:
    folder = make_run(tmp_path / "trl", None)
    page = open_page(write_report([folder], tmp_path / "page.html")).page
    drawn(page)
    expect(page.get_by_text(re.compile("figures left out")).first).to_be_visible()
