"""The pictures of docs/report.md and README.md, taken in a browser from reports of the quickstart and of a sweep.

    bash scripts/browser_env.sh    # once: Chromium, playwright
    bash scripts/quickstart.sh && saeforge fit --config configs/sweeps/eight.yaml    # and what docs/report.md says
    python scripts/report_pictures.py --run runs/quickstart --sweep runs/eight --out docs/images

SAEFORGE_BROWSER names the browser. Pictures have 255 colours, which keeps each of them below 250 kB.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

import saeforge

COLOURS, GAP, DESK, PHONE = 255, 28, (1280, 1620), (390, 800)


def shot(
    browser: Any, page: Path, size: tuple[int, int], scheme: str, *, at: str | None = None, over: str = ""
) -> Image.Image:
    """What a screen shows.

    Args:
        browser: started.
        page: the file.
        size: of the screen; one narrower than 600 has two dots a pixel.
        scheme: light or dark.
        at: selector of what is scrolled to the top.
        over: selector of what is pointed at.
    """
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme=scheme,
        reduced_motion="reduce",
        device_scale_factor=2 if size[0] < 600 else 1,
    )
    opened = context.new_page()
    opened.goto(page.resolve().as_uri())
    if at:
        opened.locator(at).evaluate("(node) => node.scrollIntoView()")
    if over:
        opened.locator(over).first.hover()
    picture = Image.open(io.BytesIO(opened.screenshot())).convert("RGB")
    context.close()
    return picture


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures of one height."""
    right = right.resize((round(right.width * left.height / right.height), left.height), Image.Resampling.LANCZOS)
    both = Image.new("RGB", (left.width + GAP + right.width, left.height), "#c9c6be")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + GAP, 0))
    return both


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--sweep", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    run, sweep = saeforge.report(given.run), saeforge.report(given.sweep)
    executable = os.environ.get("SAEFORGE_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        pictures = {
            "report-run": beside(
                shot(browser, run, DESK, "light"), shot(browser, run, PHONE, "dark", at="#latents article >> nth=0")
            ),
            "report-sweep": shot(browser, sweep, (1280, 1450), "light", over="#frontier .plot:visible .mark >> nth=2"),
        }
        browser.close()
    given.out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        path = given.out / f"{name}.png"
        picture.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE).save(
            path, optimize=True
        )
        print(f"{path}: {picture.width} x {picture.height}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
