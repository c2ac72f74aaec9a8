"""The search page by keyboard and by ear, on screens of two widths, light and dark; and when things go wrong."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks.search_page import missing_browser
from tests.serve.page.conftest import Tab, tell_missing

# Contrast (WCAG 2.1, 1.4.3) of every text that is seen with the ground it stands on; the worst below 4.5 : 1.
CONTRAST = """() => {
  const parts = (css) => {
    const c = document.createElement('canvas').getContext('2d'); c.fillStyle = css; c.fillRect(0, 0, 1, 1);
    return [...c.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) { const c = parts(getComputedStyle(e).backgroundColor); if (c[3] === 255) return c; }
    return parts(getComputedStyle(document.documentElement).colorScheme.includes('dark') ? '#000' : '#fff');
  };
  const poor = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    const [a, b] = [light(parts(getComputedStyle(e).color)), light(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${e.tagName} ${e.textContent.trim().slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return poor;
}"""


# Controls without a name for a screen reader, and pictures without a text.
NAMELESS = """() => [...document.querySelectorAll('button, input, select, a, summary, [tabindex="0"], canvas[role]')]
  .filter((e) => e.checkVisibility())
  .filter((e) => !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.textContent.trim()
    || [...(e.labels ?? [])].some((label) => label.textContent.trim())))
  .map((e) => e.outerHTML.slice(0, 120))"""
# What the keyboard is on, and whether that is seen: by an outline of its own, or of the bar or label around it.
FOCUS = """() => {
  const e = document.activeElement, style = (x) => getComputedStyle(x);
  const outlined = (x) => x && style(x).outlineStyle !== 'none' && parseFloat(style(x).outlineWidth) >= 2;
  const seen = outlined(e) || outlined(e.nextElementSibling) || style(e.closest('.bar') ?? e).boxShadow !== 'none';
  return [e.id || e.className || e.name || e.textContent.trim().slice(0, 20), seen];
}"""
DESK = {"viewport": {"width": 1280, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


def test_all_of_it_by_keyboard(tab: Tab) -> None:
    page = tab.go()
    places = []
    while "words" not in places:
        page.keyboard.press("Tab")
        name, seen = page.evaluate(FOCUS)
        assert seen, name
        places.append(name)
    assert places == ["skip", "home", "words"]
    page.keyboard.type("red")
    page.keyboard.press("Enter")
    assert tab.products()[0] == "p1"
    places = []
    while "picture" not in places:
        page.keyboard.press("Tab")
        name, seen = page.evaluate(FOCUS)
        assert seen, name
        places.append(name)
    assert places[:2] == ["file", "button strong"]  # the camera is for telephones
    assert {"category", "attr:material", "price_min", "price_max", "hybrid"} <= set(places)
    # The focus alone shows the map, and the name says where the match is.
    page.wait_for_selector(".picture[data-heat=on]")
    label = page.locator(":focus").get_attribute("aria-label")
    assert label.startswith("Heat map on Red sofa. Matched part: ") and label.endswith("% of the picture")


def test_a_box_by_keyboard(tab: Tab) -> None:
    page = tab.go()
    tab.give_photo("file")
    assert tab.products()[0] == "p1"
    page.locator("#stage").focus()
    page.keyboard.press("Enter")
    assert page.get_attribute("#stage", "aria-label") == "Box in the centre, 25% of the picture"
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    for _ in range(5):
        page.keyboard.press("Shift+ArrowUp")
    page.keyboard.press("ArrowDown")
    page.wait_for_selector("#live:has-text('Box ')", state="attached")
    page.wait_for_selector("#headline:has-text('the box on your photo')")
    assert len(tab.asked("/search")) <= 3  # one for the photo; not one for each key
    page.keyboard.press("Delete")
    page.wait_for_selector("#headline:has-text('for your photo')")
    assert page.get_attribute("#stage", "aria-label") == "No box on the photo"
    assert page.evaluate("document.activeElement.id") == "stage"


@pytest.mark.parametrize("options", [PHONE], ids=["phone"])
def test_a_finger_draws_a_box(tab: Tab, options: dict[str, Any]) -> None:
    page = tab.go()
    tab.give_photo("camera")
    assert tab.products()[0] == "p1"
    place = page.locator("#preview").bounding_box()
    touch = page.context.new_cdp_session(page)
    for kind, *at in (("touchStart", 0.7, 0.35), ("touchMove", 0.96, 0.78), ("touchEnd",)):
        points = [{"x": place["x"] + at[0] * place["width"], "y": place["y"] + at[1] * place["height"]}] if at else []
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.wait_for_selector("#headline:has-text('the box on your photo')")
    assert tab.products()[0] == "p2"


@pytest.mark.parametrize("options", [PHONE], ids=["phone"])
def test_a_tap_shows_the_heat_map_and_takes_it_away(tab: Tab, options: dict[str, Any]) -> None:
    page = tab.go("/?q=red")
    assert tab.products()[0] == "p1"
    page.locator(".picture").first.tap()
    page.wait_for_selector(".picture[data-heat=on]")
    page.wait_for_timeout(400)  # sooner it would be a double tap
    page.locator(".picture").first.tap()
    page.wait_for_selector(".picture[data-heat=on]", state="detached")


@pytest.mark.parametrize("options", [DESK, {**PHONE, "reduced_motion": "reduce"}], ids=["desk", "phone"])
def test_it_can_be_read_everywhere(tab: Tab, options: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """ECLIP_SCREENSHOTS=FOLDER keeps what was seen."""
    page = tab.go()
    folder = Path(os.environ.get("ECLIP_SCREENSHOTS", ""))

    def look(name: str) -> None:
        assert page.evaluate(NAMELESS) == []
        assert page.evaluate("document.documentElement.scrollWidth") == options["viewport"]["width"]
        # A box is drawn over the photo, and nowhere else.
        assert page.locator("#overlay").bounding_box() == page.locator("#preview").bounding_box()
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate(CONTRAST) == []
            if folder.name:
                folder.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=folder / f"{request.node.callspec.id}_{name}_{scheme}.png")

    look("start")
    page.goto(tab.url + "/?q=red+sofa&category=Living+room")
    assert tab.products()[0] == "p1"
    look("results")
    tab.give_photo("file")
    page.wait_for_selector("#headline:has-text('your photo')")
    assert tab.products()[0] == "p1"
    look("photo")
    page.goto(tab.url + "/?q=red&category=Nowhere")
    page.wait_for_selector("#notice:visible")
    look("nothing")
    tab.errors[:] = [error for error in tab.errors if "422" not in error]  # the console tells of the refusal


def test_an_error_is_the_servers_own_line_and_can_be_tried_again(tab: Tab) -> None:
    page = tab.go()
    line = "the server is busy: 256 questions wait; try again in a moment"
    page.route("**/search", lambda route: route.fulfill(status=503, json={"error": line}))
    page.fill("#words", "red")
    page.press("#words", "Enter")
    page.wait_for_selector(f"#notice:has-text('{line}')")
    assert page.wait_for_selector(f"#live:has-text('No answer. {line}')", state="attached")
    page.unroute("**/search")
    page.click("#notice button")
    assert tab.products()[0] == "p1"
    assert page.locator("#notice:visible").count() == 0
    page.route("**/search", lambda route: route.abort())
    page.click("button[type=submit]")
    page.wait_for_selector("#notice:has-text('The server cannot be reached')")
    page.unroute("**/search")
    tab.errors.clear()  # Chromium says both failures itself


def test_a_file_that_is_no_picture_is_told(tab: Tab) -> None:
    page = tab.go()
    page.set_input_files("#file", {"name": "prices.jpg", "mimeType": "image/jpeg", "buffer": b"12,50"})
    page.wait_for_selector("#notice:has-text('prices.jpg: the browser cannot read this picture')")
    assert not tab.asked("/search")


def test_a_late_answer_never_overwrites_a_newer_one(tab: Tab) -> None:
    page = tab.go()
    newer = threading.Event()
    late: list[Any] = []

    def hold(route: Any) -> None:
        body = route.request.post_data or ""
        if "blue" in body and not newer.is_set():
            late.append(route)
        else:
            route.continue_()

    page.route("**/search", hold)
    page.clock.install()
    page.fill("#words", "blue")
    page.press("#words", "Enter")
    page.clock.fast_forward(200)
    assert page.locator(".skeleton").count() == 8
    assert page.get_attribute("#results", "aria-busy") == "true"
    page.clock.fast_forward(4000)
    page.wait_for_selector("#notice:has-text('Still searching')")
    newer.set()
    page.fill("#words", "red")
    page.press("#words", "Enter")
    page.wait_for_selector("#headline:has-text('“red”')")
    for route in late:
        route.fulfill(body=json.dumps({"hits": [], "photo": None, "seconds": {}}))
    page.clock.run_for(500)
    page.wait_for_timeout(100)
    assert tab.products()[0] == "p1"
    assert page.inner_text("#headline") == "6 products for “red”"


def test_a_machine_without_a_browser_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    missing = missing_browser() or ""
    assert "no Chromium on PATH" in missing or "playwright is not installed" in missing
    for name in ("CI", "ECLIP_REQUIRE_BROWSER"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(pytest.skip.Exception, match="the search page is not tested: no"):
        tell_missing("no browser")
    for name, value in (("CI", "true"), ("ECLIP_REQUIRE_BROWSER", "1")):
        with monkeypatch.context() as required:
            required.setenv(name, value)
            with pytest.raises(pytest.fail.Exception, match="cannot be tested: no"):
                tell_missing("no browser")
