"""The search page in a real browser, over the real server, searcher and index: words, photos, boxes, filters, maps."""

from urllib.parse import parse_qs, urlsplit

import pytest

from benchmarks.search_page import draw_box
from tests.serve.page.conftest import Tab

# Around the small blue thing of the photo, as shares of the photo's sides.
AROUND_BLUE = (0.7, 0.35, 0.96, 0.78)
# How much of a picture the heat map covers, 0 to 255: in the middle of the box that is drawn, and in a corner.
COVERED = """(picture) => {
  const map = picture.querySelector('canvas'), size = picture.querySelector('svg').viewBox.baseVal;
  const box = picture.querySelector('.box rect').getBBox();
  const pixels = map.getContext('2d').getImageData(0, 0, map.width, map.height).data;
  const at = (x, y) => pixels[4 * (Math.floor(y * map.height) * map.width + Math.floor(x * map.width)) + 3];
  return [at((box.x + box.width / 2) / size.width, (box.y + box.height / 2) / size.height), at(0.98, 0.02)];
}"""


def test_words_find_the_product_and_its_place_in_the_picture(tab: Tab) -> None:
    page = tab.go()
    assert page.locator("#examples button").count() >= 3
    assert "12 pictures of 6 products" in page.inner_text("#subline")
    page.fill("#words", "blue lamp")
    page.press("#words", "Enter")
    assert tab.products()[0] == "p2"
    assert page.inner_text("#headline") == "6 products for “blue lamp”"
    assert page.wait_for_selector("#live:has-text('6 products for “blue lamp”')", state="attached")
    assert parse_qs(urlsplit(page.url).query) == {"q": ["blue lamp"]}
    # The box that is drawn stands on the screen where the blue thing is: see `ColourCatalogue` for its places.
    image = page.locator(".card img").first
    thing, frame = page.locator(".card .box rect:last-child").first.bounding_box(), image.bounding_box()
    shares = [(thing[side] - frame[side]) / frame["width"] for side in ("x", "y")] + [thing["width"] / frame["width"]]
    place = [0.25, 0.25, 0.5] if image.get_attribute("width") == "240" else [0.125, 0.1875, 0.25]
    assert shares == pytest.approx(place, abs=0.04)
    # A title is text: what looks like HTML in it is shown as it is.
    assert page.locator("#injected").count() == 0
    assert page.locator("h3", has_text="Yellow desk <b id=injected>sale</b> & more").count() == 1


def test_the_address_holds_the_query(tab: Tab) -> None:
    page = tab.go("/?q=green+chair&attr=material%3Dwood")
    assert tab.products()[0] == "p3" and len(tab.products()) == 3
    assert page.input_value("#words") == "green chair"
    assert page.input_value("[name='attr:material']") == "wood"
    page.fill("#words", "red")
    page.click("button[type=submit]")
    assert tab.products()[0] == "p1"
    page.go_back()
    page.wait_for_selector("#headline:has-text('green chair')")
    assert tab.products()[0] == "p3"
    page.go_forward()
    page.wait_for_selector("#headline:has-text('“red”')")
    page.click("#home")
    page.wait_for_selector("#start:visible")
    assert page.evaluate("location.search") == ""
    page.click("#examples button >> nth=0")
    assert len(tab.products()) == 6


def test_a_photo_finds_its_product_however_it_is_given(tab: Tab) -> None:
    for kind in ("drop", "paste", "file", "camera"):
        tab.go()
        tab.give_photo(kind)
        assert tab.products()[0] == "p1", kind


def test_a_box_says_which_thing_of_the_photo_is_meant(tab: Tab) -> None:
    page = tab.go()
    tab.give_photo("drop")
    assert tab.products()[0] == "p1"
    draw_box(page, AROUND_BLUE)
    page.wait_for_selector("#headline:has-text('the box on your photo')")
    assert tab.products()[0] == "p2"
    assert "right" in page.get_attribute("#stage", "aria-label")
    page.click("#box-clear")
    page.wait_for_selector("#headline:has-text('for your photo')")
    assert tab.products()[0] == "p1"
    # Words say it as well; the part that they are found on is dashed, and can be searched.
    page.fill("#words", "blue")
    page.press("#words", "Enter")
    page.wait_for_selector("#headline:has-text('“blue” and your photo')")
    assert tab.products()[0] == "p2"
    page.click("#box-found")
    page.wait_for_selector("#headline:has-text('the box')")
    assert tab.products()[0] == "p2"
    # Back finds the photo again while the tab lives.
    page.go_back()
    page.wait_for_selector("#headline:has-text('“blue” and your photo')")
    page.click("#photo-remove")
    page.wait_for_selector("#headline:text-is('6 products for “blue”')")


def test_a_result_can_be_the_question(tab: Tab) -> None:
    page = tab.go("/?q=red")
    assert tab.products()[0] == "p1"
    page.get_by_role("button", name="More like Green chair").click()
    page.wait_for_selector("#headline:has-text('on your photo')")
    assert tab.products()[0] == "p3"


def test_filters(tab: Tab) -> None:
    page = tab.go("/?q=red")
    page.select_option("[name=category]", "Living room")
    page.wait_for_selector("#applied button:has-text('Living room')")
    page.wait_for_selector("#headline:has-text('2 products')")
    assert tab.products() == ["p1", "p3"]
    page.fill("[name=price_max]", "100")
    page.press("[name=price_max]", "Enter")
    page.wait_for_selector("#headline:has-text('1 product ')")
    assert tab.products() == ["p3"]
    assert parse_qs(urlsplit(page.url).query) == {"q": ["red"], "category": ["Living room"], "max": ["100"]}
    page.fill("[name=price_max]", "1")
    page.press("[name=price_max]", "Enter")
    page.wait_for_selector("#notice:has-text('Nothing passes these filters')")
    page.click("#notice button")
    page.wait_for_selector("#headline:has-text('6 products')")
    assert page.locator("#applied li").count() == 0


def test_the_heat_map_is_asked_once_and_not_for_a_blink(tab: Tab) -> None:
    page = tab.go("/?q=red")
    assert tab.products()[0] == "p1"
    pictures = page.locator(".picture")
    pictures.nth(0).hover()
    page.mouse.move(2, 2)
    page.wait_for_timeout(300)
    assert not tab.asked("/locate")
    pictures.nth(0).hover()
    page.wait_for_selector(".picture[data-heat=on] >> nth=0")
    # Where the red thing is, the map covers the picture; in the corner it does not.
    middle, corner = pictures.nth(0).evaluate(COVERED)
    assert middle > 100 and corner < 20
    page.mouse.move(2, 2)
    page.wait_for_selector(".picture[data-heat=on]", state="detached")
    pictures.nth(0).hover()
    page.wait_for_selector(".picture[data-heat=on]")
    assert len(tab.asked("/locate")) == 1
