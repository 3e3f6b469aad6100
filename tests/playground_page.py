"""Fixtures and helpers of the playground's tests: a real browser and a fake server on loopback.

A test module imports the fixtures it uses and those that these use. (Not in conftest.py: no other
test needs Playwright.)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playground_fake import Fake, Running, make_app
from playwright.sync_api import expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@dataclass
class Page:
    """A page with what it said and asked for."""

    page: Any
    fake: Fake
    base: str
    console: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def column(self, index: int) -> Any:
        return self.page.locator(".column").nth(index)

    def run(self) -> None:
        """Ctrl+Enter, until every column is through."""
        self.page.keyboard.press("Control+Enter")
        self.settled()

    def settled(self) -> None:
        expect(self.page.locator("#run")).to_be_enabled()
        self.page.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")

    def part(self, index: int, name: str) -> Any:
        return self.column(index).locator(f"[data-part={name}]")

    def facts(self, index: int) -> dict[str, str]:
        rows = self.part(index, "facts").locator("> div").all()
        return {row.locator("dt").inner_text(): row.locator("dd").inner_text() for row in rows}


@pytest.fixture(scope="module", name="chromium")
def chromium_fixture() -> Iterator[Any]:
    """For one module only: while it runs, asyncio.run refuses to work in this thread."""
    if CHROMIUM is None:
        pytest.skip("no Chromium found: install the package chromium, or name one in CHROMIUM")
    expect.set_options(timeout=30_000)  # a busy machine is no failure
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module", name="site")
def site_fixture() -> Iterator[tuple[Fake, str]]:
    fake = Fake()
    with Running(make_app(fake)) as url:
        yield fake, url


@pytest.fixture(name="fake")
def fake_fixture(site: tuple[Fake, str]) -> Fake:
    """The one server of all tests, forgotten what the last one did."""
    state = site[0]
    state.__dict__.update(Fake().__dict__)
    return state


def opened(chromium: Any, fake: Fake, url: str, **options: Any) -> Iterator[Page]:
    """One page of a fresh browser context, closed after the loop's only round."""
    context = chromium.new_context(**{"viewport": {"width": 1300, "height": 900}, **options})
    context.set_default_timeout(30_000)
    page = context.new_page()
    made = Page(page, fake, url)
    page.on("console", lambda said: made.console.append(f"{said.type}: {said.text}"))
    page.on("pageerror", lambda failure: made.console.append(f"pageerror: {failure}"))
    page.on("request", lambda request: made.asked.append(request.url))
    page.goto(f"{url}/playground")
    expect(page.locator("#server")).not_to_have_text("connecting …")
    yield made
    context.close()


# A refused request is an error to the browser's console, whatever the page makes of it.
EXPECTED = "error: Failed to load resource: the server responded with a status of"


@pytest.fixture(name="page")
def page_fixture(chromium: Any, site: tuple[Fake, str], fake: Fake) -> Iterator[Page]:
    """A fresh page; afterwards: no complaint in the console, no request to anyone else."""
    for made in opened(chromium, fake, site[1]):
        yield made
        assert [line for line in made.console if not line.startswith(EXPECTED)] == []
        assert [url for url in made.asked if not url.startswith(made.base + "/")] == []
