"""Records of CSV and JSON lines: strictness, separators, line numbers."""

import csv
import json
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.dataloading.tables.table_files import GOOD, HEADER, read, refusal, table_of

ROWS = [f"P{n},chair {n},Chairs,a.jpg\n" for n in range(6)]


@pytest.mark.parametrize("at", [0, 3, 5], ids=["first", "middle", "last"])
@pytest.mark.parametrize(
    "row, wrong",
    [
        ('P,"24 monitor,Monitors,a.jpg\n', "never ends"),
        ('"P,monitor,Monitors,a.jpg\n', "never ends"),
        ('P,monitor,Monitors,"a.jpg\n', "never ends"),
        ('P,"two ""inner"" and\nanother line,Monitors,a.jpg\n', "never ends"),
        ('P,"24" monitor,Monitors,a.jpg\n', "text after its closing quote"),
        ('P,"24"monitor,Monitors,a.jpg\n', "text after its closing quote"),
        ('P,"24", "x\n"y,a.jpg\n', "text after its closing quote"),
    ],
)
def test_a_broken_quote_is_named_by_the_line_it_begins_at(tmp_path: Path, at: int, row: str, wrong: str) -> None:
    content = HEADER + "".join([*ROWS[:at], row, *ROWS[at:]])
    message = refusal(tmp_path, content)
    assert f"t.csv, line {at + 2}: " in message and wrong in message and "--no-quotes" in message
    assert f"line {at + 4}: " in refusal(tmp_path, "\r\n\n" + content)


def test_an_unclosed_quote_that_meets_a_later_one_is_named_where_it_begins(tmp_path: Path) -> None:
    content = HEADER + ROWS[0] + 'P,"24 monitor,Monitors,a.jpg\n' + ROWS[1] + 'P,"red" chair,Chairs,b.jpg\n'
    assert "line 3: the quoted cell that begins here has text after" in refusal(tmp_path, content)


def test_rows_swallowed_between_two_inch_marks_are_not_lost_in_silence(tmp_path: Path) -> None:
    """Valid CSV by the letter: one title that holds the end of its row, a row, and the begin of another."""
    content = HEADER + GOOD + 'P2,"24 monitor,Monitors,b.jpg\n' + ROWS[1] + 'P3,24",Monitors,c.jpg\n'
    rows, rejected = read(tmp_path, content)
    assert [row.product for row in rows] == ["P1"]
    assert [(r.where, r.reason) for r in rejected] == [
        ("t.csv, row 2", "title seems to hold whole rows: a quote that is not closed?")
    ]


@pytest.mark.parametrize(
    "header, swallowing, column",
    [
        ("product,title,image\n", 'P,"a,a.jpg\nP,b,b.jpg\nP,c",c.jpg\n', "title"),
        ("image,title,product\n", 'a.jpg,"a,P\na.jpg,b,P\nc.jpg,c",P\n', "title"),
        ("product,title,image,text\n", 'P,a,a.jpg,"24 inch\nP,b,b.jpg,\nP,c,c.jpg,24 inch"\n', "text"),
        ("product,title,image,x,y,z\n", 'P,"a,123,1,2,3\nP,b",123,1,2,3\n', "title"),
        ("product,title,image,\n", 'P,a,a.jpg,"24 inch\nP,b,b.jpg,24 inch"\n', "column 4"),
    ],
)
def test_swallowed_rows_wherever_the_quotes_are(tmp_path: Path, header: str, swallowing: str, column: str) -> None:
    good = dict(product="P1", title="t", image="a.jpg")
    first = ",".join(good.get(name, "") for name in header.strip().split(",")) + "\n"
    rows, rejected = read(tmp_path, header + first + swallowing + first)
    assert [row.number for row in rows] == [1, 3]
    assert [r.reason for r in rejected] == [f"{column} seems to hold whole rows: a quote that is not closed?"]


def test_texts_of_several_lines_are_no_swallowed_rows(tmp_path: Path) -> None:
    content = HEADER.replace("\n", ",description\n")
    cells = ['"Chair, red\nwith arms, wide"', '"Chair, red, wide\nwith arms"', '"Chair\n\n, red"']
    for cell in cells:
        content += f"P,{cell},A,a.jpg,{cell}\n"
    rows, rejected = read(tmp_path, content + 'P,a,A,"a.jpg,\nb.jpg",x\n')
    assert len(rows) == 4 and not rejected and rows[3].images == ("a.jpg", "b.jpg")


def test_tables_put_one_after_the_other(tmp_path: Path) -> None:
    rows, rejected = read(tmp_path, (("\ufeff" + HEADER + GOOD) * 2))
    assert [row.number for row in rows] == [1, 3] and [r.reason for r in rejected] == ["the header once more"]
    line = '\ufeff{"product": "P", "title": "a", "category": "A", "image": "a.jpg"}\n'
    assert len(read(tmp_path, line * 3, "t.jsonl")[0]) == 3


def test_a_header_of_several_lines_and_odd_letters(tmp_path: Path) -> None:
    rows, _ = read(tmp_path, '"Product\nId","Title\x07","\u200eCategory",Image\nP1,a,A,a.jpg\n')
    assert rows[0].product == "P1" and rows[0].title == "a"
    long = "z" * 500
    assert "x\\x07y, 'zz" in refusal(tmp_path, f'x\x07y,{long},"a\nb"\n1,2,3\n')


def test_backslashes_before_quotes_are_told_how_to_double_them(tmp_path: Path) -> None:
    content = HEADER + 'P1,"24\\" monitor",A,a.jpg\n'
    message = refusal(tmp_path, content)
    command = message.partition("doubled by: ")[2].partition("; it begins")[0]
    doubled = subprocess.run([*shlex.split(command), str(tmp_path / "t.csv")], capture_output=True, check=True).stdout
    assert read(tmp_path, doubled)[0][0].title == '24" monitor'


@pytest.mark.parametrize(
    "above",
    ["# exported 2026-01-01\n", "Products of spring,,,\n,,,\n", "a\tb\n", '"a ""quoted"" line"\n\n', "one;two;three\n"],
)
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_header_below_the_first_line_is_pointed_at(tmp_path: Path, above: str, separator: str) -> None:
    content = above + (HEADER + "".join(ROWS)).replace(",", separator)
    line = above.count("\n") + 1
    assert f"line {line} seems to name them (product, title, category, image): " in refusal(tmp_path, content)


def test_quotes_may_be_letters(tmp_path: Path) -> None:
    content = HEADER + 'P1,"24 monitor,Monitors,a.jpg\nP2,"Best" chair,Chairs,b.jpg\nP3,19" rack,Racks,c.jpg\n'
    rows, rejected = read(tmp_path, content, quotes=False)
    assert [row.title for row in rows] == ['"24 monitor', '"Best" chair', '19" rack'] and not rejected


def test_quoted_cells_hold_separators_quotes_and_lines(tmp_path: Path) -> None:
    content = HEADER + 'P1,"Chair, ""red""\nwith arms",Chairs,a.jpg\n\n"P2", "desk, big" ,"Desks",b.jpg\n'
    rows, _ = read(tmp_path, content.replace('" ,', '",'))
    assert [row.title for row in rows] == ['Chair, "red" with arms', "desk, big"]
    broken = content.replace('" ,', '",') + "P3,,Chairs,c.jpg\n"
    _, rejected = read(tmp_path, broken)
    assert (rejected[0].where, rejected[0].detail) == ("t.csv, row 3", "line 6")  # lines 2 to 3, 5, and 6


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends(tmp_path: Path, end: str, last: bool) -> None:
    content = (HEADER + "".join(ROWS)).replace("\n", end)
    rows, rejected = read(tmp_path, content if last else content.removesuffix(end))
    assert [row.product for row in rows] == [f"P{n}" for n in range(6)] and not rejected


def test_mixed_line_ends_and_blank_lines(tmp_path: Path) -> None:
    content = "\n\r\n  \n" + HEADER + "P1,a,A,a.jpg\r\n\r\nP2,b,B,b.jpg\r   \nP3,c,C,c.jpg\n\n\n"
    rows, rejected = read(tmp_path, content)
    assert [(row.number, row.product) for row in rows] == [(1, "P1"), (2, "P2"), (3, "P3")] and not rejected


@pytest.mark.parametrize("size", [131_072, 200_000, 1_000_000])
def test_long_cells(tmp_path: Path, size: int) -> None:
    content = f"product,title,category,image,description\nP1,{'t' * size},A,a.jpg,{'d' * size}\n"
    (row,), _ = read(tmp_path, content)
    assert len(row.title) == size


def test_an_endless_cell_is_an_unclosed_quote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = csv.field_size_limit(50_000)
    monkeypatch.setattr("eclip.dataloading.tables.records.MAX_CELL", 50_000)
    try:
        content = HEADER + GOOD + 'P2,"chair,Chairs,a.jpg\n' + ROWS[1] * 4000
        assert "line 3: a cell begins here and does not end within" in refusal(tmp_path, content)
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize(
    "row, reason",
    [
        ("P2,chair,Chairs", "fewer cells than the header"),
        ("P2", "fewer cells than the header"),
        ("P2,chair,red,Chairs,b.jpg", "more cells than the header"),
        (",,,", "empty row"),
        (" , ,\t, ", "empty row"),
    ],
)
def test_rows_of_another_width_are_rejected_by_number(tmp_path: Path, row: str, reason: str) -> None:
    rows, rejected = read(tmp_path, HEADER + GOOD + row + "\n" + "P3,desk,Desks,c.jpg\n")
    assert [r.number for r in rows] == [1, 3]
    assert [(r.kind, r.where, r.reason) for r in rejected] == [("row", "t.csv, row 2", reason)]
    assert rejected[0].detail.startswith("line 3")


def test_empty_cells_beyond_the_header_and_missing_ones_without_a_name(tmp_path: Path) -> None:
    rows, rejected = read(tmp_path, HEADER + "P1,chair,Chairs,a.jpg,,\n")
    assert len(rows) == 1 and not rejected
    rows, rejected = read(tmp_path, HEADER.replace("\n", ",,\n") + GOOD)
    assert len(rows) == 1 and not rejected


def test_most_rows_of_another_width_are_a_wrong_separator(tmp_path: Path) -> None:
    message = refusal(tmp_path, "product;title;category;image\n" + "P,a;b;c,d;A;a.jpg;x\n" * 3)
    assert "3 of 3 rows have more cells than the header (line 2: 6 instead of 4)" in message
    assert "separator semicolon" in message and "--separator" in message


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.txt", "T.CSV"])
def test_separators_are_found(tmp_path: Path, separator: str, name: str) -> None:
    lines = ['product,title,category,"image"', 'P1,"a, b; c | d",A,a.jpg', "P2,24'',B,b.jpg"]
    content = "\n".join(line.replace(",", separator) if "a, b" not in line else line for line in lines)
    content = content.replace('P1,"a, b; c | d",A,a.jpg', f'P1{separator}"a, b; c | d"{separator}A{separator}a.jpg')
    rows, rejected = read(tmp_path, content, name)
    assert [row.title for row in rows] == ["a, b; c | d", "24''"] and not rejected


@pytest.mark.parametrize(
    "first",
    ["sep=;", '"sep=;"', "SEP=;", "sep=;;;;", "\ufeffsep=;"],
    ids=["plain", "quoted", "capitals", "cells", "bom"],
)
def test_excels_separator_line(tmp_path: Path, first: str) -> None:
    rows, rejected = read(tmp_path, first + "\r\nproduct;title;category;image\r\nP1;a,b;A;a.jpg\r\nP2;;A;a.jpg\r\n")
    assert rows[0].title == "a,b" and rejected[0].detail == "line 4"


def test_the_separator_is_that_under_which_the_header_is_understood(tmp_path: Path) -> None:
    rows, _ = read(
        tmp_path, "image;title|de,long;product;x,y,z\na.jpg;chair;P1;1,2,3\n", columns={"title": "title|de,long"}
    )
    assert rows[0].title == "chair"
    rows, _ = read(tmp_path, "title;image;a,b,c,d,e\nchair;a.jpg;1\n")
    assert rows[0].product == "chair"


@pytest.mark.parametrize("given", [";", "semicolon", "Semicolon", "~"])
def test_a_given_separator(tmp_path: Path, given: str) -> None:
    letter = given if len(given) == 1 else ";"
    rows, _ = read(tmp_path, (HEADER + GOOD).replace(",", letter), separator=given)
    assert rows[0].title == "Red chair"


@pytest.mark.parametrize("given", ["", ",,", '"', "x", "7", "\n", "commas"])
def test_an_impossible_separator_is_refused(tmp_path: Path, given: str) -> None:
    assert "--separator" in refusal(tmp_path, HEADER + GOOD, separator=given)


@pytest.mark.parametrize("content", ["", "\n", " \r\n\t\n", "\ufeff", "\ufeff\n"])
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_empty_files(tmp_path: Path, content: str, name: str) -> None:
    assert "empty" in refusal(tmp_path, content, name)


@pytest.mark.parametrize("content", [HEADER, HEADER.strip(), "\n" + HEADER + "\n\n", "sep=,\n" + HEADER])
def test_a_header_alone(tmp_path: Path, content: str) -> None:
    assert "a header and no rows" in refusal(tmp_path, content)


def test_control_characters_reject_their_row(tmp_path: Path) -> None:
    content = HEADER + "P1,re\x08d,A,a.jpg\n" + "P2,\x93red\x94,A,a.jpg\n" + "P3,red\x0bchair,A,a.jpg\n"
    rows, rejected = read(tmp_path, content)
    assert [row.title for row in rows] == ["red chair"]  # a vertical tab is a blank
    assert [r.reason for r in rejected] == ["title holds control characters"] * 2


@pytest.mark.parametrize("hole", [1, 50, 5000])
def test_zero_bytes_reject_their_row_in_whatever_column(tmp_path: Path, hole: int) -> None:
    """As a disk leaves them that crashed: rows are gone with their line ends, here within a column of no use."""
    content = HEADER.replace("\n", ",text\n") + "".join(f"P{n},chair,A,a.jpg,a long text\n" for n in range(700))
    holed = content[:9000] + "\0" * hole + content[9000 + hole :]
    rows, rejected = read(tmp_path, holed)
    assert {r.reason for r in rejected} == {"zero bytes: a part of the file, and rows with it, may be lost"}
    assert len(rows) + len(rejected) == holed.count("\n") - 1


def test_json_lines(tmp_path: Path) -> None:
    good = {"product": "P1", "title": "Chair", "category": "Chairs", "image": ["a.jpg", "b.jpg"]}
    lines = [json.dumps(good), "", json.dumps(good | {"title": "\u2028line"}, ensure_ascii=False), "  "]
    for name in ("t.jsonl", "t.ndjson", "t.json"):
        rows, rejected = read(tmp_path, "\r\n".join(lines), name)
        assert [(row.number, row.title) for row in rows] == [(1, "Chair"), (2, "line")] and not rejected
        assert rows[0].images == ("a.jpg", "b.jpg")


def test_a_repeated_key_rejects_its_row(tmp_path: Path) -> None:
    good = '{"product": "P1", "title": "a", "category": "A", "image": "a.jpg"}\n'
    twice = good.replace('"title"', '"title": "b", "title"')
    rows, rejected = read(tmp_path, good + twice + good.replace('"a"}', '"a", "x": {"y": 1, "y": 2}}'), "t.jsonl")
    assert len(rows) == 2 and rejected[0].reason == "a key occurs twice" and "'title'" in rejected[0].detail


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"product": 1}\n{"product"\n', "line 2: not valid JSON"),
        ('\n\n{"product": 1\n', "line 3: not valid JSON"),
        ('{"a": 1}{"a": 2}\n', "line 1: not valid JSON (Extra data"),
        (
            '[\n{"a": 1},\n{"a": 2}\n]',
            "JSON lines hold an object a line; an array becomes lines by",
        ),
        ('[{"a": 1}, {"a": 2}]', "jq -c"),
        ('{\n "product": 1\n}\n', "objects over several lines become lines by"),
        ('"text"\n', "found str"),
        ("[" * 100_000, "line 1: not valid JSON"),
        ('{"product": ' + "9" * 5000 + "}", "line 1: not valid JSON"),
        ("product,title\n", "line 1: not valid JSON"),
        ('{"product": 1}\n{"product": 2, "tit', "line 2: not valid JSON"),
        ('{"product": 1}\n{"product": 2, "tit', "complete the file if it was cut off"),
        ('{"product": 1}\n{"product": 2, "tit\n', 'mend or delete the line); it begins \'{"product": 2, "tit'),
        ("{'product': 1}\n", "it begins \"{'product': 1}"),
    ],
)
@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_broken_json_is_named_by_its_line(tmp_path: Path, content: str, message: str, name: str) -> None:
    assert message in refusal(tmp_path, content, name)


def test_flags_that_do_nothing_for_json_lines_are_refused(tmp_path: Path) -> None:
    for options in ({"separator": ";"}, {"quotes": False}):
        assert "not for JSON lines" in refusal(tmp_path, "{}\n", "t.jsonl", **options)


def test_a_name_that_occurs_twice(tmp_path: Path) -> None:
    twice = "product,title,title,category,image\nP1,a,b,A,a.jpg\n"
    assert "2 columns may be title: title, title (2)" in refusal(tmp_path, twice)
    assert read(tmp_path, twice, columns={"title": "title (2)"})[0][0].title == "b"
    assert read(tmp_path, twice, columns={"title": "title"})[0][0].title == "a"
    empty = "product,title,title,category,image,x,x,x\nP1,,b,A,a.jpg,1,2,3\n"
    assert read(tmp_path, empty)[0][0].title == "b"
    images = "product,title,category,image,image,image\nP1,a,A,a.jpg,b.jpg,\n"
    assert read(tmp_path, images)[0][0].images == ("a.jpg", "b.jpg")


def test_cells_without_a_name_are_no_columns(tmp_path: Path) -> None:
    table = table_of(tmp_path, ",product,title,,category,image\n0,P1,a,x,A,a.jpg\n1,P2,b,y,A,b.jpg\n")
    assert [row.product for row in table.rows([])] == ["P1", "P2"]
    assert table.columns.used == {"product", "title", "category", "image"}
