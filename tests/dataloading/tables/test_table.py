"""Opening tables and reading their rows; what the parts do in detail is tested with them."""

import argparse
import json
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from eclip.dataloading import pack
from eclip.dataloading.errors import Rejection
from eclip.dataloading.tables import add_table_arguments, open_table, table_options
from tests.dataloading.tables.table_files import GOOD, HEADER, image_folder, read, refusal, table_of


def test_a_row(tmp_path: Path) -> None:
    header = "product,title,category,image,sku,source,catalog,title_de,attribute_colour\n"
    rows, rejected = read(
        tmp_path, header + "P1,Chair,Chairs,a.jpg|b.jpg,s,Customer,c,Stuhl,red\nP2,Desk,Desks,c.jpg,,,,,\n"
    )
    assert vars(rows[0]) == {
        "number": 1,
        "product": "P1",
        "title": "Chair",
        "category": "Chairs",
        "images": ("a.jpg", "b.jpg"),
        "sku": "s",
        "source": "customer",
        "catalog": "c",
        "titles": {"de": "Stuhl"},
        "attributes": {"colour": "red"},
    }
    assert (rows[1].sku, rows[1].source, rows[1].catalog) == ("P2", "detail", "P2")
    assert rows[1].titles == {} and rows[1].attributes == {} and not rejected


def test_rejections_stand_in_order_beside_the_good_rows(tmp_path: Path) -> None:
    lines = [
        GOOD,
        "P2,,Chairs,a.jpg\n",
        "P3,Desk,Desks\n",
        GOOD,
        ",Lamp,Lamps,a.jpg\n",
        "P6,Lamp,,a.jpg\n",
        "P7,Sofa,Sofas,\n",
    ]
    rows, rejected = read(tmp_path, HEADER + "".join(lines))
    assert [row.number for row in rows] == [1, 4]
    assert [(r.kind, r.where, r.reason, r.detail) for r in rejected] == [
        ("row", "t.csv, row 2", "no title", "line 3"),
        ("row", "t.csv, row 3", "fewer cells than the header", "line 4: 3 instead of 4"),
        ("row", "t.csv, row 5", "no product", "line 6"),
        ("row", "t.csv, row 6", "no category", "line 7"),
        ("row", "t.csv, row 7", "no image", "line 8"),
    ]


def test_rows_can_be_read_again(tmp_path: Path) -> None:
    table = table_of(tmp_path, HEADER + GOOD + "P2,,,\n")
    first, second = ([], []), ([], [])
    for rows, rejected in (first, second):
        rows.extend(table.rows(rejected))
    assert first == second and len(first[0]) == 1 and len(first[1]) == 1 and table.count == 2


@pytest.mark.parametrize(
    "name, way_out",
    [
        ("t.xlsx", "save the sheet as 'CSV UTF-8'"),
        ("t.XLS", "save the sheet"),
        ("t.parquet", "read_parquet"),
        ("t.csv.gz", "gunzip"),
        ("t.zip", "unzip"),
        ("t.xml", "save the table as CSV"),
        ("table", "save the table as CSV"),
    ],
)
def test_other_kinds_are_refused_with_a_way_out(tmp_path: Path, name: str, way_out: str) -> None:
    message = refusal(tmp_path, HEADER + GOOD, name)
    assert (
        "expected a table ending in .csv, .tsv, .tab, .txt, .jsonl, .ndjson or .json" in message and way_out in message
    )


def test_a_missing_image_folder(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(HEADER + GOOD)
    (tmp_path / "file").touch()
    for name in ("none", "file", "t.csv"):
        with pytest.raises(ValueError, match="no such folder of images"):
            open_table(tmp_path / "t.csv", tmp_path / name)


@pytest.mark.parametrize("what", ["table", "folder of images"])
def test_places_that_may_not_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    (tmp_path / "t.csv").write_text(HEADER + GOOD)
    place = tmp_path / "t.csv" if what == "table" else image_folder(tmp_path)
    stat = os.stat

    def denied(path, *args, **options):
        if os.path.normpath(os.fsdecode(path)) == str(place):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", denied)
    with pytest.raises(ValueError, match=rf"cannot be read \(Permission denied\); choose another {what}") as error:
        open_table(tmp_path / "t.csv", tmp_path / "photos")
    assert str(place) in str(error.value)


def test_what_is_broken_far_down_is_found_when_the_table_is_opened(tmp_path: Path) -> None:
    many = HEADER + GOOD * 5000
    image_folder(tmp_path)
    for tail, message in ((b'P,"a,A,a.jpg\n', "line 5002"), (b"P,\xff,A,a.jpg\n", "line 5002")):
        (tmp_path / "t.csv").write_bytes(many.encode() + tail + GOOD.encode() * 10)
        with pytest.raises(ValueError, match=message):
            open_table(tmp_path / "t.csv", tmp_path / "photos")


def test_a_table_that_changes_meanwhile(tmp_path: Path) -> None:
    table = table_of(tmp_path, HEADER + GOOD * 3)
    rows = table.rows([])
    next(rows)
    (tmp_path / "t.csv").write_text(HEADER + GOOD * 4)
    for reading in (rows, table.rows([])):
        with pytest.raises(ValueError, match="changed while it was read"):
            list(reading)


def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        text = "".join(f"P{n},{'chair ' * 20}{n},Chairs,a.jpg\n" for n in range(rows))
        tracemalloc.start()
        try:
            table = table_of(tmp_path, HEADER + text)
            del text
            tracemalloc.reset_peak()
            assert sum(1 for _ in table.rows([])) == rows
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # imports and caches
    assert peak(4000) < 500_000  # the text alone is 0.6 MB


def test_damaged_tables_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    """Whatever is damaged: all rows are accounted for, and what is given out can be written as UTF-8 JSON."""
    lines = [f'P{n},"Chair, ""red"" {n}",Chairs,a.jpg|b.jpg,s{n},detail,Stuhl,x\n' for n in range(4)]
    table = HEADER.replace("\n", ",sku,source,title_de,attribute_x\n") + "".join(lines)
    cells = dict(zip(HEADER.strip().split(","), ("P", "Chair", "Chairs", ["a.jpg", "b.jpg"]), strict=True))
    contents = {
        "t.csv": table.encode(),
        "t.tsv": table.replace(",", "\t").encode("utf-16"),
        "t.jsonl": b"\n".join(json.dumps(cells | {"attribute_x": [n]}).encode() for n in range(4)),
    }
    texts = '" "" , ; | \t \n \r \0 [ ] { } : nan NaN % ? / ../ sep=; 1e999 \\ \\ud800 title \ufeff \u2028 \x85'
    damage = [*(text.encode() for text in texts.split(" ")), b"", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80"]
    rng = random.Random(0)
    outcomes: set[str] = set()
    refusals: list[ValueError] = []
    for _ in range(300):
        name, content = rng.choice(list(contents.items()))
        for _ in range(rng.randrange(1, 5)):
            place = rng.randrange(len(content))
            content = content[:place] + rng.choice(damage) + content[place + rng.choice((0, 1, 5)) :]
        rejected: list[Rejection] = []
        try:
            opened = table_of(tmp_path, content, name)
            rows = list(opened.rows(rejected))
        except ValueError as error:
            refusals.append(error)
            continue
        assert len(rows) + len(rejected) == opened.count
        assert all(text.isprintable() for text in [*opened.summary(), *(r.reason + r.detail for r in rejected)])
        for row in rows:
            json.dumps(vars(row), ensure_ascii=False, allow_nan=False).encode()
        outcomes |= {"read" for _ in rows} | {"rejected" for _ in rejected}
    assert outcomes == {"read", "rejected"} and len(refusals) > 30
    assert all(str(error).isprintable() and not isinstance(error, UnicodeError) for error in refusals)


def test_the_flags(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_table_arguments(parser)
    assert table_options(parser.parse_args([])) == {"columns": {}, "encoding": None, "separator": None, "quotes": True}
    flags = ["--column", "title=what", "--column", "sku=", "--encoding", "cp1252", "--separator", "pipe", "--no-quotes"]
    options = table_options(parser.parse_args(flags))
    content = 'product|what|category|image\nP1|"Stühle|A|a.jpg\n'.encode("cp1252")
    (row,), _ = read(tmp_path, content, **options)
    assert row.title == '"Stühle'
    with pytest.raises(ValueError, match="FIELD=NAME"):
        table_options(parser.parse_args(["--column", "title"]))


SCRIPT = """
import json, sys
from pathlib import Path
from eclip.dataloading.tables.table import open_table
table = open_table(Path(sys.argv[1]), Path(sys.argv[2]))
rejected = []
print(json.dumps([[row.title, row.images] for row in table.rows(rejected)]))
"""


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_the_locale_does_not_matter(tmp_path: Path, locale: dict[str, str]) -> None:
    photos = image_folder(tmp_path)
    (photos / "stühle, rot.jpg").touch()
    (tmp_path / "t.csv").write_text(HEADER + 'P1,Stühle 椅子,Stühle,"stühle, rot.jpg"\n', encoding="utf-8")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "t.csv"), str(photos)]
    done = subprocess.run(command, env=os.environ | locale, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["Stühle 椅子", ["stühle, rot.jpg"]]]


def test_the_packing_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shop's export as it comes; the report stands before the counts, and a refusal is one line."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (40, 40), "red").save(photos / name)
    table = tmp_path / "export.csv"
    table.write_bytes("sep=;\r\nBezeichnung;assets;facets\r\nSchöner Stuhl;a.jpg, b.jpg;Stühle\r\n".encode("cp1252"))
    command = ["--table", str(table), "--images", str(photos), "--out", str(tmp_path / "out"), "--no-progress"]
    for flags, message in (([], "--encoding cp1252"), (["--encoding", "cp1252"], "--column title=NAME")):
        with pytest.raises(SystemExit) as stopped:
            pack.main([*command, *flags])
        refused = capsys.readouterr().err
        assert stopped.value.code in (1, 2) and len(refused.splitlines()) == 1 and message in refused
    pack.main([*command, "--encoding", "cp1252", "--column", "title=bezeichnung"])
    printed = capsys.readouterr().out
    assert "title <- Bezeichnung" in printed and "separator semicolon, encoding cp1252" in printed
    assert "train 1; 2 images" in printed
