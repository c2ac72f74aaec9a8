"""Pictures of the search page on a trained index, as a reader sees it: benchmarks/results/search_page.png.

    python -m benchmarks.search_page --index index/demo_towers --out benchmarks/results    # after `make serve`

Starts the real server over the index. On a screen of 1280 px: a photo of the catalogue, a box drawn on one thing of it
and the pointer resting on the first result, for its heat map. On one of 390 px: words, and a tap on the first result.
Needs playwright and a Chromium (the extra "browser"). Tests of the page use the functions.
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from PIL import Image

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
# Of the demo's test split: a photo of an armchair, a plant, a white board and a basketball; the box is the plant's.
PHOTO, BOX, WORDS = "test/blendswap-cc-0-139/013.jpg", (12.0, 59.0, 58.0, 105.0), "purple briefcase"


def missing_browser() -> str | None:
    """What to install before a page can be looked at; None where all is there."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return 'playwright is not installed: pip install -e ".[serve,browser]"'
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


@contextmanager
def server(index: str) -> Iterator[str]:
    """`python -m eclip.serve` over an index, on a free port: its address."""
    command = [sys.executable, "-m", "eclip.serve", "--index", index, "--port", "0", "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://[^\s/]+", process.stdout.readline())
        if found is None:
            raise SystemExit(process.wait() or 1)  # it has said why
        yield found[0]
    finally:
        process.terminate()
        process.wait()


def desk(opened: Any, address: str, out: Path, photo: str, box: tuple[float, ...]) -> None:
    """A box on a photo, and the first result's heat map: 1280 px wide."""
    page = opened.new_page(viewport={"width": 1280, "height": 800})
    page.goto(address)
    data = page.request.get(f"{address}/thumbnails/{quote(photo)}").body()
    page.set_input_files("#file", {"name": Path(photo).name, "mimeType": "image/jpeg", "buffer": data})
    page.wait_for_selector("#headline:has-text('your photo')")
    answered(page)
    width, height = (page.locator("#preview").get_attribute(side) for side in ("width", "height"))
    x0, y0, x1, y1 = box
    draw_box(page, (x0 / float(width), y0 / float(height), x1 / float(width), y1 / float(height)))
    page.wait_for_selector("#headline:has-text('the box')")
    answered(page)
    page.locator(".picture").first.hover()
    page.wait_for_selector(".picture[data-heat=on]")
    page.wait_for_timeout(500)  # it fades in
    keep(page.screenshot(), out / "search_page.png")
    page.close()


def phone(opened: Any, address: str, out: Path, words: str) -> None:
    """Words, and the first result's heat map after a tap: 390 px wide."""
    context = opened.new_context(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page = context.new_page()
    page.goto(f"{address}/?{urlencode({'q': words})}")
    answered(page)
    page.locator(".picture").first.tap()
    page.wait_for_selector(".picture[data-heat=on]")
    page.wait_for_timeout(500)
    keep(page.screenshot(), out / "search_page_phone.png")
    context.close()


def keep(screenshot: bytes, path: Path) -> None:
    """Write a picture in 256 colours: half the bytes, for the repository."""
    with Image.open(io.BytesIO(screenshot)) as image:
        picture = image.convert("RGB")
        palette = picture.quantize(256, Image.Quantize.MEDIANCUT)
        picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description="Pictures of the search page on an index.")
    parser.add_argument("--index", required=True, help="what eclip embed wrote")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the pictures")
    parser.add_argument("--photo", default=PHOTO, help="id of a picture of the index that is asked with")
    parser.add_argument("--box", type=float, nargs=4, default=BOX, help="x0 y0 x1 y1 in its pixels")
    parser.add_argument("--words", default=WORDS, help="what is asked on the small screen")
    arguments = parser.parse_args()
    if missing := missing_browser():
        sys.exit(f"error: {missing}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with server(arguments.index) as address, browser() as opened:
        desk(opened, address, arguments.out, arguments.photo, tuple(arguments.box))
        phone(opened, address, arguments.out, arguments.words)


if __name__ == "__main__":
    main()
