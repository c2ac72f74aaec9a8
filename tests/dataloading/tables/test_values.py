"""What cells become, and which reject their row."""

import json
from pathlib import Path
from typing import Any

import pytest

from eclip.dataloading.tables.values import BadCell, clean, clean_attribute, clean_id
from tests.dataloading.tables.table_files import GOOD, HEADER, read

CELLS = {"product": "P2", "title": "Chair", "category": "Chairs", "image": "a.jpg"}


def rejection(folder: Path, **cells: Any) -> tuple[str, str]:
    """Reason and detail for the second of three JSON rows."""
    rows = [CELLS | {"product": "P1"}, CELLS | cells, CELLS | {"product": "P3"}]
    good, rejected = read(folder, "\n".join(map(json.dumps, rows)), "t.jsonl")
    assert [row.product for row in good] == ["P1", "P3"]
    assert [(r.kind, r.where) for r in rejected] == [("row", "t.jsonl, row 2")]
    return rejected[0].reason, rejected[0].detail


@pytest.mark.parametrize("field", ["product", "title", "category", "sku", "source", "catalog", "title_de"])
@pytest.mark.parametrize(
    "value, reason",
    [
        (["a"], "a list, not text"),
        ([], "a list, not text"),
        ({"en": "a"}, "an object, not text"),
        (True, "true or false, not text"),
        (float("inf"), "an infinite number, not text"),
        (float("-inf"), "an infinite number, not text"),
        (1e300, "a number too long to be exact: write it as text"),
        ("\ud800", "half a character"),
        ("a\udfffb", "half a character"),
        ("a\0b", "control characters"),
        ("a\x1bb", "control characters"),
    ],
)
def test_what_is_no_text_rejects_its_row(tmp_path: Path, field: str, value: Any, reason: str) -> None:
    found, detail = rejection(tmp_path, **{field: value})
    assert found.startswith(field) and reason in found and detail.isprintable() and detail.startswith("line 2")


@pytest.mark.parametrize("field", ["product", "title", "category"])
@pytest.mark.parametrize(
    "value, why",
    [
        (None, ""),
        ("", ""),
        (" \t\n", ""),
        ("\xa0\u3000", ""),
        ("\u200b\ufeff", ""),
        ("\u200d\u2060\u00ad", ""),
        ("\u3164", "no visible character"),
        ("\u115f\u1160\uffa0", "no visible character"),
        ("\u2800", "no visible character"),
        ("\u0301\u0308", "no visible character"),
        ("\x00\x01", "no visible character"),
        ("\ufe0f", "no visible character"),
        ("\ue000", "no visible character"),
        ("\U000e0041", "no visible character"),
        (float("nan"), "a mark for a missing value"),
        *((text, "a mark for a missing value") for text in ("nan", "NaN", "Nan", "null", "NULL", "None", "none")),
        *((text, "a mark for a missing value") for text in ("N/A", "n/a", "NA", "#N/A", "<NA>", "NaT", " nan ", "-")),
        *((text, "a mark for a missing value") for text in ("\\N", "#REF!", "#VALUE!", "(null)", "[object Object]")),
    ],
)
def test_missing_cells_reject_their_row(tmp_path: Path, field: str, value: Any, why: str) -> None:
    found, _ = rejection(tmp_path, **{field: value})
    assert found == (f"no {field} ({why})" if why else f"no {field}")


@pytest.mark.parametrize("mark", ["nan", "NaN", "null", "None", "N/A"])
def test_marks_for_missing_cells_in_csv(tmp_path: Path, mark: str) -> None:
    header = HEADER.replace("\n", ",sku,source,catalog,title_de,attribute_x\n")
    content = (
        header + f"P1,a,A,a.jpg,{mark},{mark},{mark},{mark},{mark}\n" + f"P2,{mark},A,a.jpg,,,,,\nP3,a,A,{mark},,,,,\n"
    )
    (row,), rejected = read(tmp_path, content)
    assert (row.sku, row.source, row.catalog, row.titles, row.attributes) == ("P1", "detail", "P1", {}, {})
    assert [(r.where, r.reason) for r in rejected] == [
        ("t.csv, row 2", "no title (a mark for a missing value)"),
        ("t.csv, row 3", "no image"),
    ]
    assert repr(mark) in rejected[0].detail  # a product that is really called so is found in the list


@pytest.mark.parametrize(
    "value, text",
    [
        ("  a \t b\n c ", "a b c"),
        ("\ufeff\u200bchair\u200b", "chair"),
        ("a\xa0b\u2028c", "a b c"),
        (123, "123"),
        (123.0, "123"),
        (12.5, "12.5"),
        (-0.0, "0"),
        (10**30, str(10**30)),
        ("123.0", "123.0"),
        ("Nantes", "Nantes"),
        ("None of these", "None of these"),
        ("🪑", "🪑"),
        ("👨‍👩‍👧", "👨‍👩‍👧"),
        ("...", "..."),
        ("می‌خواهم", "می‌خواهم"),
        ("e\u0301", "\u00e9"),
        ("\u1100\u1161", "\uac00"),
        ("a" + " " * 500_000 + "b", "a b"),
        ("\ufffd", "\ufffd"),
    ],
)
def test_texts(value: Any, text: str) -> None:
    assert clean(value, "title", required=True) == text


@pytest.mark.parametrize("value", ["4.00638E+12", "4,00638E+12", "1E+15"])
def test_an_id_that_a_spreadsheet_rounded(tmp_path: Path, value: str) -> None:
    assert "format that column as text" in rejection(tmp_path, product=value)[0]
    assert clean(value, "title", required=True) == value
    assert clean_id("4006381333931", "product") == "4006381333931" and clean_id("SE+12", "product") == "SE+12"


@pytest.mark.parametrize("value", [0, False, "red", [1, {"a": None}], {"w": 1.5}, "Ünder"])
def test_attributes_are_any_json(value: Any) -> None:
    assert clean_attribute(value, "attribute_x") == value


@pytest.mark.parametrize("value", [None, "", "  ", "nan", float("nan")])
def test_missing_attributes(value: Any) -> None:
    assert clean_attribute(value, "attribute_x") is None


@pytest.mark.parametrize("value", [float("inf"), [float("nan")], {"a": [float("-inf")]}, "\ud800", ["\udfff"]])
def test_attributes_that_no_json_holds(tmp_path: Path, value: Any) -> None:
    with pytest.raises(BadCell):
        clean_attribute(value, "attribute_x")
    assert "attribute_x holds NaN" in rejection(tmp_path, attribute_x=value)[0]


def test_reasons_group(tmp_path: Path) -> None:
    bad = [CELLS | {"title": value} for value in (["a"], ["b", "c"], {"d": 1}, {"e": 2}, True, False, "nan", "NULL")]
    _, rejected = read(tmp_path, "\n".join(map(json.dumps, [CELLS, *bad])), "t.jsonl")
    assert len(rejected) == 8 and len({r.reason for r in rejected}) == 4


def test_an_odd_optional_text_is_left_out_where_it_is_only_missing(tmp_path: Path) -> None:
    (row,), rejected = read(tmp_path, HEADER.replace("\n", ",title_de\n") + GOOD.replace("\n", ",\u3164\n"))
    assert row.titles == {} and not rejected
