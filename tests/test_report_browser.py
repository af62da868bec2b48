"""Pages in a real browser: light, dark, desk, phone and paper. `scripts/browser_env.sh` says how to get one.

Skipped where there is no Chromium, or no playwright to drive it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import saeforge
from tests.run_folders import write_features, write_run, write_sweep

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("SAEFORGE_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
HOW = "see scripts/browser_env.sh"
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}

playwright = pytest.importorskip("playwright.sync_api", reason=f"playwright is not installed: {HOW}")
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no Chromium was found: {HOW}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser without a window."""
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of one run, whose text is hostile, and one of a sweep."""
    home = tmp_path_factory.mktemp("pages")
    run = write_run(home / "one", features=False)
    hostile = "</script><script>window.broken = 1</script><img src=x onerror='window.broken=1'>"
    write_features(run, tokens=[hostile, "w" * 300, " שלום עולם", "<b>", "\n", " plain"] * 4)
    return {"one": saeforge.report(run), "several": saeforge.report(write_sweep(home / "eight"))}


class Opened:
    """A page, and everything that it complained of or asked for."""

    def __init__(self, browser: Any, path: Path, viewport: dict[str, int], scheme: str, **options: Any) -> None:
        self.context = browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce", **options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "request", lambda request: self.complaints.append(request.url) if request.url.startswith("http") else None
        )
        self.page.goto(path.resolve().as_uri())

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()


def contrast(page: Any, selector: str) -> float:
    """WCAG contrast of an element's text with the page's background."""
    found: float = page.evaluate(
        """(selector) => {
          const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
          const luminance = (colour) => {
            canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
              .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const node = document.querySelector(selector);
          let behind = node;
          while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
          const style = getComputedStyle(node);
          const [a, b] = [style.color, getComputedStyle(behind).backgroundColor].map(luminance).sort((x, y) => y - x);
          return (a + 0.05) / (b + 0.05);
        }""",
        selector,
    )
    return found


@pytest.mark.parametrize("name", ["one", "several"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_a_page_fits_and_complains_of_nothing(
    browser: Any, pages: dict[str, Path], tmp_path: Path, name: str, scheme: str, viewport: dict[str, int]
) -> None:
    with Opened(browser, pages[name], viewport, scheme) as opened:
        page = opened.page
        for details in page.query_selector_all("details"):
            details.evaluate("(node) => { node.open = true; }")
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide == 0
        picture = page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert len(picture) > 20_000  # something is drawn
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 25)"
        assert dark == (scheme == "dark")
        assert page.evaluate("window.broken") is None
        outside = page.evaluate(
            """[...document.querySelectorAll(".plot:not([hidden])")]
              .flatMap((svg) => [...svg.querySelectorAll("text, .mark, .column")]
              .filter((n) => n.getBBox().x < -1 || n.getBBox().x + n.getBBox().width > svg.viewBox.baseVal.width + 8)
              .map((n) => n.textContent + n.outerHTML))"""
        )
        assert outside == []
        assert opened.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser: Any, pages: dict[str, Path], scheme: str) -> None:
    with Opened(browser, pages["one"], DESK, scheme) as opened:
        for selector in (
            "h1",
            "section > .lede",
            ".tiles .note",
            ".facts dt",
            "td.note",
            ".chip",
            "summary",
            "mark.h8",
            "mark.h3",
            "cite",
        ):
            assert contrast(opened.page, selector) >= 4.5, selector


def test_pointing_at_a_chart_shows_its_figures(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["several"], DESK, "light") as opened:
        page = opened.page
        page.locator("#frontier .plot:visible .mark").first.hover()
        tip = page.locator(".tip")
        assert tip.is_visible()
        said = tip.inner_text().split()
        assert said[0] == "topk-16"
        assert "0.225" in said  # its FVU
        page.locator("#curves .plot:visible").first.hover()
        assert "tokens" in tip.inner_text()
        assert tip.locator("div").count() == 8
        page.locator("#density .plot:visible").first.hover()
        assert "latents" in tip.inner_text()
        page.mouse.move(5, 5)
        assert not tip.is_visible()


def test_a_finger_and_the_keyboard_reach_the_same_figures(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["one"], PHONE, "light", has_touch=True) as opened:
        page = opened.page
        plot = page.locator("#curves .plot:visible").first
        plot.tap()
        assert page.locator(".tip").is_visible()
        box = page.locator(".tip").bounding_box()
        assert box
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]
        plot.focus()
        page.keyboard.press("Home")
        first = page.locator(".tip").inner_text()
        page.keyboard.press("ArrowRight")
        assert page.locator(".tip").inner_text() != first
        assert "validation" in page.locator("[aria-live]").text_content()
        page.keyboard.press("Escape")
        assert not page.locator(".tip").is_visible()


def test_buttons_change_the_scale_hide_a_series_sort_the_table_and_the_theme(
    browser: Any, pages: dict[str, Path]
) -> None:
    with Opened(browser, pages["several"], DESK, "light") as opened:
        page = opened.page
        chart = page.locator("#frontier .chart").first
        assert chart.locator(".plot:visible").get_attribute("data-view") == "log"
        chart.get_by_role("button", name="linear").click()
        assert chart.locator(".plot:visible").get_attribute("data-view") == "linear"
        page.locator("#frontier .legend .key", has_text="gated").click()
        shown = page.evaluate(
            """[...document.querySelectorAll("#frontier .plot:not([hidden]) .series")]
              .filter((g) => getComputedStyle(g).opacity === "1").map((g) => g.dataset.series)"""
        )
        assert shown == ["topk", "l1_relu"] * 2  # in both charts
        head = page.locator("#runs th button", has_text="FVU")
        column = page.locator("#runs tbody tr td:nth-child(5)")
        head.click()
        up = column.all_inner_texts()
        assert up[-1] == "\N{EN DASH}"  # what was not judged stays last
        assert up[:-1] == sorted(up[:-1], key=float)
        head.click()
        assert column.all_inner_texts() == [*reversed(up[:-1]), "\N{EN DASH}"]
        page.locator(".theme").click()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 25)"
        assert opened.complaints == []


def test_without_a_script_everything_is_there_to_read(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["several"], DESK, "light", java_script_enabled=False) as opened:
        page = opened.page
        assert page.locator("#frontier .plot .mark").first.is_visible()
        assert not page.locator(".modes").first.is_visible()  # buttons that would do nothing
        assert page.locator("#runs tbody tr").count() == 8


def test_on_paper_nothing_is_folded_and_the_bar_is_gone(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["one"], DESK, "dark") as opened:
        page = opened.page
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert not page.locator(".bar").is_visible()
        assert page.evaluate("[...document.querySelectorAll('details')].every((d) => d.open)")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(252, 251, 248)"
