"""A real headless browser without a network, and what went wrong in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Page, expect, sync_playwright

torch.set_num_threads(1)
PATIENCE = 120_000
"""Milliseconds that anything may take, for a machine with other work."""
expect.set_options(timeout=PATIENCE)


@dataclass
class Opened:
    """A page, and everything that it should not have said or asked for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium or Chrome of this machine."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.fail("the browser tests need chromium or google-chrome: apt-get install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Opened]]:
    """`open_page(file, fragment="", **context)` opens a file offline, and waits for its microscope.

    After the test: no console errors or warnings, no uncaught error, no dialog, no request but for the file.
    """
    every: list[tuple[Path, Opened]] = []

    def start(file: Path, fragment: str = "", **context: Any) -> Opened:
        page = browser.new_context(
            offline=True, **{"viewport": {"width": 1400, "height": 900}, **context}
        ).new_page()
        page.set_default_timeout(PATIENCE)
        opened = Opened(page)
        every.append((file, opened))
        page.on("console", lambda message: opened.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (opened.complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: opened.requests.append(request.url))
        page.goto(file.as_uri() + fragment)
        page.wait_for_selector("#microscope[data-ready]")
        return opened

    yield start
    for file, opened in every:
        opened.page.context.close()
        assert opened.complaints == []
        assert {url.partition("#")[0] for url in opened.requests} == {file.as_uri()}
