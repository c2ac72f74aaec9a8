"""Pictures of the search page on a trained index, as a reader sees it: benchmarks/results/search_page.png.

    python -m benchmarks.search_page --index INDEX --out benchmarks/results

Starts the real server over the index, asks with a photo of the catalogue, a box drawn on one thing of it and words, and
rests the pointer on the first result for its heat map. Needs playwright and a Chromium (the extra "browser").
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
LARGEST = 400_000
"""Bytes of a picture in the repository."""


def missing_browser() -> str | None:
    """What to install before a page can be looked at; None where all is there."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return 'playwright is not installed: pip install "eclip[serve,browser]"'
    if find_chromium() is None:
        return f"no Chromium on PATH ({', '.join(CHROMIUMS)}): install it (Debian: apt-get install chromium)"
    return None


def find_chromium() -> str | None:
    """The path of an installed Chromium."""
    return next((path for name in CHROMIUMS if (path := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Any]:
    """A Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root Chromium has no sandbox; the page is our own.
        opened = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()


def draw_box(page: Any, box: tuple[float, float, float, float]) -> None:
    """Drag over the photo on the page: x0, y0, x1, y1 as shares of its sides."""
    stage = page.locator("#preview").bounding_box()
    across, down, width, height = (stage[name] for name in ("x", "y", "width", "height"))
    page.mouse.move(across + box[0] * width, down + box[1] * height)
    page.mouse.down()
    page.mouse.move(across + box[2] * width, down + box[3] * height, steps=5)
    page.mouse.up()


def answered(page: Any) -> None:
    """Wait until the page shows the results of what was asked last."""
    page.wait_for_selector("body[data-state=results] #results[aria-busy=false]")
    near = "[...document.querySelectorAll('.card img')].filter((image) => image.loading === 'eager')"
    page.evaluate(f"() => Promise.all({near}.map((image) => image.decode()))")
