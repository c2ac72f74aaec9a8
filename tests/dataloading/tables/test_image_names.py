"""Lists and spellings of image names, checked against the files that are there."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from eclip.dataloading.tables.image_names import ImageNames
from tests.dataloading.tables.table_files import image_folder, read, refusal, table_of


def rows_of(*cells: Any) -> str:
    rows = [{"product": f"P{n}", "title": "a", "category": "A", "image": cell} for n, cell in enumerate(cells)]
    return "\n".join(map(json.dumps, rows))


def images_of(folder: Path, *cells: Any) -> list[list[str]]:
    rows, rejected = read(folder, rows_of(*cells), "t.jsonl")
    assert not rejected
    return [list(row.images) for row in rows]


@pytest.mark.parametrize("separator", ["|", ";", ",", " ", "\n", " | ", ", ", "; ", "  ", ",\n"])
def test_lists_are_split_where_files_are(tmp_path: Path, separator: str) -> None:
    lists = [["a.jpg", "b.jpg"], ["c.jpg"], ["d.jpg", "a.jpg", "b.jpg"], ["a.jpg", "lost.jpg"]]
    assert images_of(tmp_path, *(separator.join(names) for names in lists)) == lists


def test_the_separator_is_reported(tmp_path: Path) -> None:
    for separator, named in {"|": "'|'", ";": "';'", ",": "','", " ": "blanks", "\n": "line ends"}.items():
        summary = table_of(tmp_path, rows_of(f"a.jpg{separator}b.jpg"), "t.jsonl").summary()
        assert f"separated by {named}; 2 of 2 looked up" in summary[-1]


@pytest.mark.parametrize(
    "name", ["red, big.jpg", "my chair.jpg", "a|b.jpg", "a;b.jpg", "[x].jpg", "[x]", "50%.jpg", "what?.jpg"]
)
def test_names_that_are_there_are_not_split(tmp_path: Path, name: str) -> None:
    (image_folder(tmp_path) / name).touch()
    assert images_of(tmp_path, name, f"{name}", "a.jpg") == [[name], [name], ["a.jpg"]]
    for separator in "|;,":
        if separator not in name:
            assert images_of(tmp_path, f"{name}{separator}b.jpg") == [[name, "b.jpg"]]


def test_a_list_of_names_that_hold_the_separator(tmp_path: Path) -> None:
    (image_folder(tmp_path) / "red, big.jpg").touch()
    cells = ["a.jpg,b.jpg", "red, big.jpg,a.jpg", "a.jpg, red, big.jpg", "a.jpg,lost.jpg,red, big.jpg"]
    assert images_of(tmp_path, *cells) == [
        ["a.jpg", "b.jpg"],
        ["red, big.jpg", "a.jpg"],
        ["a.jpg", "red, big.jpg"],
        ["a.jpg", "lost.jpg", "red, big.jpg"],
    ]


def test_rows_may_be_split_in_different_ways(tmp_path: Path) -> None:
    cells = ["a.jpg|b.jpg", "a.jpg|c.jpg", "c.jpg,d.jpg", "lost.jpg|a.jpg", "lost me.jpg"]
    assert images_of(tmp_path, *cells) == [
        ["a.jpg", "b.jpg"],
        ["a.jpg", "c.jpg"],
        ["c.jpg", "d.jpg"],
        ["lost.jpg", "a.jpg"],
        ["lost me.jpg"],
    ]


@pytest.mark.parametrize(
    "cell",
    ['["a.jpg", "b.jpg"]', "['a.jpg', 'b.jpg']", "['a.jpg' 'b.jpg']", "[u'a.jpg', u'b.jpg']", "['a.jpg'\n \"b.jpg\"]"],
    ids=["json", "python", "numpy", "python 2", "mixed"],
)
def test_lists_as_programs_write_them_into_a_cell(tmp_path: Path, cell: str) -> None:
    assert images_of(tmp_path, cell, "c.jpg") == [["a.jpg", "b.jpg"], ["c.jpg"]]
    quoted = '"' + cell.replace('"', '""') + '"'
    rows, _ = read(tmp_path, f"product,title,category,image\nP1,a,A,{quoted}\n")
    assert rows[0].images == ("a.jpg", "b.jpg")


@pytest.mark.parametrize("cell", [r"['C:\users\a.jpg', '\x.jpg']", "['a\n.jpg']", r"['\d.jpg', 'it\'s.jpg', '\']"])
def test_lists_with_backslashes_that_are_letters(tmp_path: Path, cell: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (names, there) = images_of(tmp_path, cell, "a.jpg")
    assert all(name.endswith(".jpg") or name == cell.replace("\\", "/") for name in names) and there == ["a.jpg"]


def test_lists_of_json_lines(tmp_path: Path) -> None:
    cells = [["a.jpg"], ["a.jpg", None, " b.jpg ", "a.jpg", ""], ["red, big.jpg"], "c.jpg"]
    assert images_of(tmp_path, *cells) == [["a.jpg"], ["a.jpg", "b.jpg"], ["red, big.jpg"], ["c.jpg"]]


@pytest.mark.parametrize(
    "cell, reason",
    [
        ({"src": "a.jpg"}, "image is neither a name nor a list of names"),
        (True, "image is neither a name nor a list of names"),
        (1.5, "image is neither a name nor a list of names"),
        ([{"src": "a.jpg"}], "image is a list of something else than names: write names alone (jq does)"),
        ([["a.jpg"]], "image is a list of something else than names: write names alone (jq does)"),
        ([True], "image is a list of something else than names: write names alone (jq does)"),
        ('[{"src": "a.jpg"}]', "image is a list of something else than names: write names alone (jq does)"),
        ("\ud800.jpg", "image holds half a character (a lone surrogate)"),
        (["a.jpg", "\udfff"], "image holds half a character (a lone surrogate)"),
        (None, "no image"),
        ("", "no image"),
        ([], "no image"),
        ([None, ""], "no image"),
        ("[]", "no image"),
        ("nan", "no image"),
        (float("nan"), "no image"),
        (" | ", "no image"),
    ],
)
def test_cells_without_names_reject_their_row(tmp_path: Path, cell: Any, reason: str) -> None:
    rows, rejected = read(tmp_path, rows_of("a.jpg", cell, "b.jpg"), "t.jsonl")
    assert [row.number for row in rows] == [1, 3] and [r.reason for r in rejected] == [reason]


@pytest.mark.parametrize(
    "cell, name",
    [
        ("./sub/x y.jpg", "./sub/x y.jpg"),
        ("/sub/x y.jpg", "sub/x y.jpg"),
        ("sub\\x y.jpg", "sub/x y.jpg"),
        ("\\sub\\x y.jpg", "sub/x y.jpg"),
        (".\\sub\\x y.jpg", "./sub/x y.jpg"),
        ("sub/x%20y.jpg", "sub/x y.jpg"),
        ("/sub/x%20y.jpg?v=1700", "sub/x y.jpg"),
        ("a.jpg?width=640", "a.jpg"),
        ("0108775015", "0108775015.jpg"),
        (108, "108.png"),
        (108.0, "108.png"),
        ("108.0", "108.png"),
        ("cafe\u0301.jpg", "caf\u00e9.jpg"),
        ("u\u0308.jpg", "\u00fc.jpg"),
        ("\u00f6.jpg", "o\u0308.jpg"),
    ],
)
def test_spellings(tmp_path: Path, cell: Any, name: str) -> None:
    photos = image_folder(tmp_path)
    (photos / "sub").mkdir()
    for file in ("sub/x y.jpg", "0108775015.jpg", "108.png", "caf\u00e9.jpg", "\u00fc.jpg", "o\u0308.jpg"):
        (photos / file).touch()
    assert images_of(tmp_path, cell) == [[name]]


def test_absolute_paths_within_the_folder(tmp_path: Path) -> None:
    photos = image_folder(tmp_path)
    assert images_of(tmp_path, str(photos / "a.jpg")) == [[str(photos / "a.jpg")]]
    (photos / "x y.jpg").touch()
    for url in (f"file://{photos}/x%20y.jpg", f"file://localhost{photos}/x y.jpg"):
        assert images_of(tmp_path, url) == [[str(photos / "x y.jpg")]]
    (tmp_path / "link").symlink_to(photos)
    assert ImageNames(tmp_path / "link").exists(str(photos / "b.jpg"))


def test_what_lies_outside_is_not_there(tmp_path: Path) -> None:
    photos = image_folder(tmp_path)
    (tmp_path / "x.jpg").touch()
    names = ImageNames(photos)
    for name in ("../x.jpg", str(tmp_path / "x.jpg"), "..", ".", "", "sub", "x" * 5000, "a\0.jpg", "\ud800"):
        assert not names.exists(name), name
    assert images_of(tmp_path, "../x.jpg", "a.jpg") == [["../x.jpg"], ["a.jpg"]]  # named and rejected when packed


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    photos = image_folder(tmp_path)
    name = b"\xfcber.jpg"
    (photos / os.fsdecode(name)).touch()
    assert images_of(tmp_path, name.decode("utf-8", "surrogateescape")) == [["\udcfcber.jpg"]]


def test_none_there(tmp_path: Path) -> None:
    image_folder(tmp_path)
    (tmp_path / "photos" / "sub").mkdir()
    (tmp_path / "photos" / "sub" / "s.jpg").touch()
    urls = refusal(tmp_path, rows_of("https://shop/a.jpg", "https://shop/b.jpg"), "t.jsonl")
    assert "they are URLs: download the images first" in urls and "'image'" in urls
    assert f"give --images {tmp_path}" in refusal(tmp_path, rows_of("photos/a.jpg", "photos/b.jpg"), "t.jsonl")
    assert f"give --images {tmp_path / 'photos' / 'sub'}" in refusal(tmp_path, rows_of("s.jpg"), "t.jsonl")
    assert "remove those from the column" in refusal(tmp_path, rows_of(r"C:\shop\img\a.jpg"), "t.jsonl")
    message = refusal(tmp_path, rows_of("x.jpg", "y.jpg"), "t.jsonl")
    assert "none of 2 image names" in message and "'x.jpg'" in message and "--images" in message
    assert "x;lost,list" in refusal(tmp_path, rows_of("x;lost,list"), "t.jsonl")


@pytest.mark.parametrize(
    "name, hint",
    [
        ("A.JPG", "instead of 'A.JPG' there is 'a.jpg' (upper and lower case differ)"),
        ("./B.jpeg", "instead of './B.jpeg' there is './b.jpg' (its ending is another)"),
        ("sub/c.png", "instead of 'sub/c.png' there is 'sub/c.jpg' (its ending is another)"),
        ("file:///elsewhere/sub/c.png", ""),
        ("../photos/A.JPG", ""),
        ("none/a.jpg", ""),
        ("nul\0/a.jpg", ""),
    ],
)
def test_a_file_of_almost_that_name_is_named(tmp_path: Path, name: str, hint: str) -> None:
    photos = image_folder(tmp_path)
    (photos / "sub").mkdir()
    (photos / "sub" / "c.jpg").touch()
    message = refusal(tmp_path, rows_of(name), "t.jsonl")
    assert hint in message and ("instead of" in message) == bool(hint)
    summary = table_of(tmp_path, rows_of("a.jpg", name), "t.jsonl").summary()[-1]
    assert "1 of 2 looked up" in summary and hint in summary


def test_the_folder_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(*args: object) -> None:
        raise AssertionError("a folder may hold a million images")

    for function in ("listdir", "scandir", "walk"):
        monkeypatch.setattr(os, function, listed)
    assert images_of(tmp_path, "a.jpg, b.jpg", "c.jpg") == [["a.jpg", "b.jpg"], ["c.jpg"]]
    names = ImageNames(tmp_path / "photos")
    monkeypatch.setattr(names, "exists", listed)
    assert names.names("plain-name_1.jpg") == ["plain-name_1.jpg"]  # not even looked up: packing does
