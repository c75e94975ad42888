"""The report in a real browser: light and dark, wide and narrow, by keyboard."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        system = next(filter(None, map(shutil.which, BROWSERS)), None)
        try:
            found = playwright.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}; playwright install chromium")
        yield found
        found.close()


@pytest.fixture
def file(page: str, tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 390])
def test_it_fits_and_contrasts(browser: Any, file: Path, scheme: str, width: int) -> None:
    """Nothing is wider than the window, nothing is loaded, and the page is as light as asked."""
    view = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    asked: list[str] = []
    said: list[str] = []
    view.on("request", lambda request: asked.append(request.url))
    view.on("console", lambda message: said.append(message.text))
    view.goto(file.as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert said == []
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    shot = Image.open(io.BytesIO(view.screenshot(full_page=True))).convert("L")
    histogram = shot.histogram()
    dark = sum(histogram[:64]) / sum(histogram)
    light = sum(histogram[192:]) / sum(histogram)
    assert (light > 0.6 > dark) if scheme == "light" else (dark > 0.6 > light)
    for box in view.locator("figure svg").all():
        drawn = box.bounding_box()
        assert drawn["width"] > 250
        assert drawn["height"] > 60
    view.close()


def test_the_keyboard_reaches_figures_and_opens_tables(browser: Any, file: Path) -> None:
    view = browser.new_page(viewport={"width": 1100, "height": 800})
    view.goto(file.as_uri())
    view.keyboard.press("Tab")
    assert view.evaluate("document.activeElement.className") == "skip"
    view.keyboard.press("Enter")
    assert view.evaluate("document.activeElement.id") == "main"
    view.keyboard.press("Tab")
    view.locator("#timeline .drawing").focus()
    view.keyboard.press("Tab")
    assert view.evaluate("document.activeElement.tagName") == "SUMMARY"
    view.keyboard.press("Enter")
    assert view.locator("#timeline table").is_visible()
    named = view.locator("#timeline").get_by_role("img", name="Which positions of the response")
    assert named.count() == 1
    view.close()
