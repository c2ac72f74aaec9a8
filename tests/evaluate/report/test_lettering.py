"""Titles of every script: a font for each letter, named letters where there is none."""

from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageDraw

from eclip.evaluate.report import lettering
from eclip.evaluate.report.lettering import Lettering, clean, font_files

CHINESE, THAI, ARABIC, HEBREW = "红色沙发三人座", "เก้าอี้ไม้", "كرسي خشبي", "כיסא עץ"


def make_font(path: Path, letters: str, *, empty: bool = False) -> Path:
    """A font that has these letters as squares, or as nothing."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for point in ((100, 700), (900, 700), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    square, nothing = pen.glyph(), TTGlyphPen(None).glyph()
    names = {ord(c): f"g{ord(c)}" for c in letters}
    order = [".notdef", *names.values()]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap(names)
    builder.setupGlyf({name: nothing if empty else square for name in order})
    builder.setupHorizontalMetrics(dict.fromkeys(order, (1000, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture
def fonts(tmp_path: Path) -> list[Path]:
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    return [font_files()[0], tmp_path / "broken.ttf", make_font(tmp_path / "chinese.ttf", CHINESE + "A "),
            make_font(tmp_path / "thai.ttf", THAI)]  # fmt: skip


@pytest.mark.parametrize(
    "title",
    [
        "Lamp €20, 30 × 40 cm – “warm” Ø5½″", CHINESE, THAI, ARABIC, HEBREW, "Стол Ελληνικά Việt Nam Łódź",
        f"{ARABIC} {CHINESE} Sofa", f"Sofa {THAI}, {CHINESE}! {ARABIC}", "", "☎ ❤\ufe0f ✓ →",
    ],
)  # fmt: skip
def test_every_letter_gets_a_font_that_has_it(title: str, fonts: list[Path]) -> None:
    letters = Lettering([title], 11, fonts=fonts)
    assert letters.missing == [] and letters.note() == ""
    runs = letters.fit(title, 10_000)
    assert sorted("".join(run for _, _, run in runs)) == sorted(title)
    for part, face, run in runs:
        assert part == "text" and face.letters.issuperset(run)


def test_letters_of_no_font_are_named_in_the_line_and_in_a_note(fonts: list[Path]) -> None:
    titles = [f"Sofa {CHINESE} red", "lamp \ud800 \U0010fffd"]
    letters = Lettering(titles, 11, fonts=fonts[:1])
    assert letters.missing == [*CHINESE, "\ud800", "\U0010fffd"]
    assert letters.note() == (
        "no font here has 9 letters of the titles (U+7EA2 U+8272 U+6C99 U+53D1 U+4E09 U+4EBA U+5EA7 U+D800 ...)"
    )
    shown = "".join(run for _, _, run in letters.fit(titles[0], 10_000))
    assert shown == "Sofa [U+7EA2 U+8272 … 7 letters] red"
    assert "".join(run for _, _, run in letters.fit(titles[1], 10_000)) == "lamp [U+D800 U+10FFFD]"
    assert [part for part, _, _ in letters.fit(titles[0], 10_000)] == ["text", "missing", "text"]


def test_a_font_with_more_of_a_script_is_taken_whole(tmp_path: Path, fonts: list[Path]) -> None:
    small = make_font(tmp_path / "a_small.ttf", CHINESE[:2])
    letters = Lettering([CHINESE], 11, fonts=[small, *fonts])
    assert len(letters.fit(CHINESE, 10_000)) == 1


def test_a_font_that_draws_nothing_is_not_believed(tmp_path: Path, fonts: list[Path]) -> None:
    """As a font of colour emoji, or one of the boxes for everything."""
    blank = make_font(tmp_path / "blank.ttf", CHINESE, empty=True)
    assert Lettering([CHINESE], 11, fonts=[blank]).missing == list(CHINESE)
    assert Lettering([CHINESE], 11, fonts=[blank, *fonts]).missing == []


@pytest.mark.parametrize("title", [CHINESE * 40, "word " * 80, f"{THAI} " * 20, f"{ARABIC} " * 30])
def test_long_titles_are_cut_to_the_width(title: str, fonts: list[Path]) -> None:
    letters = Lettering([title], 11, fonts=fonts)
    runs = letters.fit(title, 300)
    width = sum(face.font.getlength(run) for _, face, run in runs)
    assert 240 < width <= 300
    assert "".join(run for _, _, run in runs).count("…") == 1


def test_a_cut_leaves_no_letter_without_its_marks() -> None:
    assert lettering._cut("ab\u0301\u0302c", 3) == "a…"
    assert lettering._cut("abc", 2) == "ab…"


def test_runs_stand_in_reading_order(fonts: list[Path]) -> None:
    """A line that begins with Arabic runs from right to left; what is Chinese or Latin in it does not."""
    letters = Lettering([ARABIC + CHINESE], 11, fonts=fonts)
    assert [run for _, _, run in letters.fit(f"{ARABIC} {CHINESE}", 10_000)] == [CHINESE, " ", ARABIC]
    assert [run for _, _, run in letters.fit(f"{CHINESE} {ARABIC}", 10_000)] == [CHINESE, " ", ARABIC]
    mixed = letters.fit(f"{ARABIC} {CHINESE}B{CHINESE}", 10_000)
    assert [run for _, _, run in mixed] == [CHINESE, "B", CHINESE, " ", ARABIC]


def test_control_and_direction_characters_do_not_reach_the_picture() -> None:
    assert clean("a\tb\n\nc\x00\x1b[31m \u202ed\u2066\ufeff\u200d") == "a b c[31m d\u200d"
    assert len(clean("x" * 10_000)) < 1000


def test_selectors_and_joiners_are_no_missing_letters() -> None:
    letters = Lettering(["❤\ufe0f a\u200db"], 11, fonts=font_files()[:1])
    assert letters.missing == []


def test_fonts_of_this_machine_are_real_ones() -> None:
    files = font_files()
    assert files[0].name == "DejaVuSans.ttf" and all(path.is_file() for path in files)
    assert not [path for path in files if "lastresort" in path.stem.lower()]


def test_fonts_of_packages_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "manimgx_fonts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    font = make_font(package / "NotoTest.ttf", CHINESE)
    monkeypatch.syspath_prepend(tmp_path)
    assert font in font_files()
    assert Lettering([CHINESE], 11).missing == []


def test_a_drawn_line_is_ink(fonts: list[Path]) -> None:
    picture = Image.new("L", (400, 30), 255)
    letters = Lettering([CHINESE], 11, fonts=fonts)
    letters.draw(ImageDraw.Draw(picture), (4, 20), CHINESE, "black", 390)
    box = picture.point(lambda v: 255 - v).getbbox()
    assert box is not None and box[0] >= 4 and 60 < box[2] - box[0] <= 11 * len(CHINESE)
