"""What a reader sees of an answer, whatever its titles hold."""

import io
from pathlib import Path

from PIL import Image

from eclip.search.query import Answer, Hit, Query, Searcher
from eclip.search.report import Shown, format_answer, write_page, write_sheet
from eclip.search.report.shown import asked_for, gather
from tests.dataloading.fixtures import jpeg

WILD = '<script>alert("x")</script>\x1b[31m\n沙发 شمعدان ' + "long " * 40


def hit(**changes: object) -> Hit:
    usual: dict[str, object] = {"id": "test/k1/000.jpg", "product": "p", "title": WILD, "category": "<b>"}
    usual |= {"attributes": {}}
    usual |= {"price": None, "score": 0.5, "box": (1, 2, 30, 20), "width": 60, "height": 40, "image": "", "source": ""}
    return Hit(**{**usual, **changes})  # type: ignore[arg-type]


def test_lines_hold_one_hit_each() -> None:
    text = format_answer(Answer(hits=[hit(), hit(price=12.5, box=None)], scored_by="cosine", seconds={"index": 0.004}))
    head, first, second, *rest = text.splitlines()
    assert "price" in head and "1,2,30,20 of 60x40" in first and "12.5" in second
    assert "\x1b" not in text and "…" in first and rest == ["", "score: cosine; index 4 ms"]


def test_a_page_escapes_and_needs_nothing_else(tmp_path: Path) -> None:
    shown = Shown(jpeg=jpeg(1), boxes=(("matched", (0.1, 0.2, 0.5, 0.9)),), title=WILD, details="<i>")
    write_page(tmp_path / "page.html", WILD, "<u>", None, [shown])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(tag not in text for tag in ("<script", "<i>", "<u>", "http:", "https:"))
    assert "left:10.00%;top:20.00%;width:40.00%;height:70.00%" in text and "data:image/jpeg;base64," in text


def test_a_sheet_draws_every_hit(tmp_path: Path) -> None:
    shown = Shown(jpeg=jpeg(1), boxes=(("matched", (0.0, 0.0, 1.0, 1.0)),), title=WILD, details="0.5")
    write_sheet(tmp_path / "sheet.png", "seven", shown, [shown] * 6)
    with Image.open(io.BytesIO((tmp_path / "sheet.png").read_bytes())) as sheet:
        red = sum(count for count, pixel in sheet.getcolors(10**6) or [] if pixel == (214, 0, 28))
        assert sheet.width > 5 * 220 and sheet.height > 2 * 220 and red > 7 * 500


def test_the_photo_is_shown_with_both_boxes(searcher: Searcher) -> None:
    query = Query(words="sofa", image=jpeg(3, 80, 60), box=(10, 10, 50, 90), limit=2)
    photo, hits = gather(searcher, query, searcher.search(query))
    assert photo is not None and [kind for kind, _ in photo.boxes] == ["asked", "matched"]
    assert photo.boxes[0][1] == (10 / 80, 10 / 60, 50 / 80, 1.0) and len(hits) == 2
    assert asked_for(query) == "“sofa” in a box of a photo"
