"""A browser, the real server over coloured things, and a tab that notes what it did."""

import base64
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

from benchmarks.search_page import answered, browser, missing_browser
from tests.serve.page.coloured_things import picture, serving

# A large red thing and a small blue one, 400 x 300; in pixels.
PHOTO = {"red": (20, 40, 240, 260), "blue": (290, 120, 370, 220)}
DROP = """([data, kind]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], 'living room.jpg', { type: 'image/jpeg' }));
  const named = kind === 'paste' ? { clipboardData: transfer } : { dataTransfer: transfer };
  const make = kind === 'paste' ? ClipboardEvent : DragEvent;
  document.body.dispatchEvent(new make(kind, { bubbles: true, cancelable: true, ...named }));
}"""

@dataclass
class Tab:
    """A page of the browser, and what it did that it should not."""

    page: Any
    url: str
    errors: list[str] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)

    def go(self, query: str = "") -> Any:
        """Open the page."""
        self.page.goto(self.url + query)
        self.page.wait_for_selector("#filters:not([hidden])", state="attached")
        return self.page

    def asked(self, path: str) -> list[Any]:
        """Requests to a path of the server."""
        return [request for request in self.requests if urlsplit(request.url).path == path]

    def products(self) -> list[str]:
        """What is shown, first to last."""
        answered(self.page)
        cards: list[str] = self.page.eval_on_selector_all(".card", "cards => cards.map((card) => card.dataset.product)")
        return cards

    def give_photo(self, kind: str) -> None:
        """Drop or paste the photo, or choose it as a file."""
        data = picture((400, 300), PHOTO)
        if kind in ("file", "camera"):
            file = {"name": "living room.jpg", "mimeType": "image/jpeg", "buffer": data}
            self.page.set_input_files(f"#{kind}", file)
        else:
            self.page.evaluate(DROP, [base64.b64encode(data).decode(), kind])
        self.page.wait_for_selector("#photo:not([hidden])")


def tell_missing(missing: str) -> None:
    """Skip with what to install; fail where the environment says that a browser must be there."""
    if os.environ.get("CI", "").lower() == "true" or os.environ.get("ECLIP_REQUIRE_BROWSER") == "1":
        pytest.fail(f"the search page cannot be tested: {missing}", pytrace=False)
    pytest.skip(f"the search page is not tested: {missing}")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser for a file's tests. Where there is none they are skipped, or fail where one is required.

    Not longer: while Playwright runs, its event loop does, and no other test of the process could start one.
    """
    if missing := missing_browser():
        tell_missing(missing)
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def url(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's address."""
    with serving(tmp_path_factory.mktemp("page")) as address:
        yield address


@pytest.fixture
def options() -> dict[str, Any]:
    """Of the browser's context: parametrize over them."""
    return {"viewport": {"width": 1280, "height": 860}}


@pytest.fixture
def tab(chromium: Any, url: str, options: dict[str, Any]) -> Iterator[Tab]:
    """A tab of a fresh browser profile. At the end: nothing on the console, nothing asked of another host."""
    context = chromium.new_context(**options)
    context.set_default_timeout(8000)
    found = Tab(context.new_page(), url)
    found.page.on("console", lambda said: said.type in ("error", "warning") and found.errors.append(said.text))
    found.page.on("pageerror", lambda error: found.errors.append(str(error)))
    found.page.on("request", lambda request: found.requests.append(request))
    yield found
    context.close()
    assert not found.errors
    assert {urlsplit(request.url).netloc for request in found.requests} == {urlsplit(url).netloc}
