"""Encodings: by mark, as told, and what is said of those that do not fit."""

import codecs
import os
from pathlib import Path

import pytest

from eclip.dataloading.tables import encoding
from tests.dataloading.tables.table_files import GOOD, HEADER, image_folder, read, refusal, table_of

TITLE = "Stühle – 椅子 🪑"
TABLES = {
    "t.csv": f"product,title,category,image\nP1,{TITLE},Stühle,a.jpg\n",
    "t.tsv": f"product\ttitle\tcategory\timage\nP1\t{TITLE}\tStühle\ta.jpg\n",
    "t.jsonl": f'{{"product": "P1", "title": "{TITLE}", "category": "Stühle", "image": "a.jpg"}}\n',
}
MARKED = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("codec", MARKED)
def test_a_mark_names_the_encoding(tmp_path: Path, name: str, codec: str) -> None:
    content = MARKED[codec] + TABLES[name].encode(codec)
    rows, rejected = read(tmp_path, content, name)
    assert (rows[0].title, rows[0].category) == (TITLE, "Stühle") and not rejected
    family = codec[:6].rstrip("-")
    assert f"encoding {family.upper()}" in table_of(tmp_path, content, name).summary()[0]
    assert read(tmp_path, content, name, encoding=family)[0] == rows
    assert read(tmp_path, content, name, encoding=codec)[0] == rows


@pytest.mark.parametrize("name", TABLES)
def test_utf8_needs_no_mark_and_other_encodings_are_told(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, TABLES[name], name)[0][0].title == TITLE
    for codec in ("utf-16-le", "utf-16-be", "gb18030", "UTF8"):
        rows, _ = read(tmp_path, TABLES[name].encode(codec), name, encoding=codec)
        assert rows[0].title == TITLE
    western = TABLES[name].replace(TITLE, "Stühle à “3 €”")
    assert read(tmp_path, western.encode("cp1252"), name, encoding="cp1252")[0][0].title == "Stühle à “3 €”"


@pytest.mark.parametrize("name", TABLES)
def test_undecodable_bytes_are_named_by_line(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path, TABLES[name].encode("gb18030"), name)
    line = 1 if name == "t.jsonl" else 2
    assert f"{name}, line {line}: byte 0x" in message and "is not UTF-8" in message and "--encoding cp1252" in message


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("rows", [0, 1, 7, 5000, 20000])
def test_the_line_is_right_wherever_it_is(tmp_path: Path, end: str, rows: int) -> None:
    """Within one block of reading and beyond, at a line's begin too."""
    whole = HEADER + GOOD * rows
    content = whole.replace("\n", end).encode() + b"\xfcbel,x,A,a.jpg" + end.encode() + GOOD.encode() * 10
    assert f"t.csv, line {rows + 2}: byte 0xfc" in refusal(tmp_path, content)


def test_a_told_encoding_that_does_not_fit_is_named(tmp_path: Path) -> None:
    assert "line 2: byte 0xc3" in refusal(tmp_path, (HEADER + "P1,ü,A,a.jpg\n").encode(), encoding="ascii")
    cut = codecs.BOM_UTF16_LE + (HEADER + GOOD).encode("utf-16-le")[:-1]
    assert "t.csv, line 2: " in refusal(tmp_path, cut) and "is not UTF-16" in refusal(tmp_path, cut)
    half = (HEADER + GOOD).encode() + "P2,ü".encode()[:-1]
    assert "line 3: byte 0xc3" in refusal(tmp_path, half)


@pytest.mark.parametrize("encoding", ["cp9999", "", "hex", "base64", "rot13", "utf-8\0", "größe"])
def test_unknown_encodings(tmp_path: Path, encoding: str) -> None:
    message = refusal(tmp_path, HEADER + GOOD, encoding=encoding)
    assert "--encoding" in message and "cp1252" in message


@pytest.mark.parametrize("mark, encoding", [("utf-8", "cp1252"), ("utf-16-le", "utf-8"), ("utf-16-be", "latin-1")])
def test_an_encoding_that_contradicts_the_mark(tmp_path: Path, mark: str, encoding: str) -> None:
    content = MARKED[mark] + (HEADER + GOOD).encode(mark)
    assert f"contradicts --encoding {encoding}; leave" in refusal(tmp_path, content, encoding=encoding)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark(tmp_path: Path, name: str, codec: str) -> None:
    assert f"give --encoding {codec}" in refusal(tmp_path, TABLES[name].encode(codec), name)


def test_bytes_of_zero_only(tmp_path: Path) -> None:
    assert "100 zero bytes" in refusal(tmp_path, bytes(100))
    assert "8000 zero bytes near" not in refusal(tmp_path, (HEADER + GOOD).encode() + bytes(8000))
    assert "a part of the file was lost" in refusal(tmp_path, (HEADER + GOOD).encode() + bytes(8000))


@pytest.mark.parametrize(
    "head, kind",
    [
        (b"PK\x03\x04....", "spreadsheet"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "old Excel"),
        (b"\x1f\x8b\x08\0\0", "gzip"),
        (b"PAR1\x15\x04", "Parquet"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"<HTML><table>", "web page"),
        (b"<?xml version='1.0'?>", "XML"),
        (b"\x89PNG\r\n", "image"),
    ],
)
def test_other_kinds_of_file_under_a_tables_name(tmp_path: Path, head: bytes, kind: str) -> None:
    for name in ("t.csv", "t.jsonl"):
        assert kind in refusal(tmp_path, head, name)


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    (tmp_path / "nowhere.csv").symlink_to("gone.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    expected = {
        "folder.csv": "a folder",
        "loop.csv": "symbolic",
        "nowhere.csv": "no such file",
        "pipe.csv": "not a file",
    }
    for name, message in (expected | {"missing.csv": "no such file"}).items():
        with pytest.raises(ValueError, match=message):
            encoding.open_text(tmp_path / name)


def test_a_table_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "t.csv"
    path.write_text(HEADER + GOOD)
    image_folder(tmp_path)
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ValueError, match="cannot be read .Permission denied"):
        encoding.open_text(path)
