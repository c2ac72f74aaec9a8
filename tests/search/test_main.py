"""`eclip search` as a user starts it: the table, JSON, a page, a picture; a mistake is one line."""

import json
import sys
from pathlib import Path

import pytest

from eclip.search.__main__ import main
from tests.dataloading.fixtures import jpeg
from tests.helpers import run_command
from tests.search.conftest import QUOTED


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo ü.jpg"
    path.write_bytes(jpeg(3, 80, 60))
    return path


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[str, object]:
    with pytest.raises(SystemExit) as stop:
        main(list(flags))
    code = stop.value.code
    return (code, 1) if isinstance(code, str) else (capsys.readouterr().err, code)


def test_a_table(shop: Path) -> None:
    said = run_command([sys.executable, "-m", "eclip.search", "--index", str(shop), "red", "sofa", "--limit", "3"])
    head, *rows = said.splitlines()
    assert head.split() == ["score", "title", "category", "price", "region", "id"]
    assert [row.split()[0] for row in rows[:3]] == ["1", "2", "3"] and "score: cosine; model" in said


def test_json_a_page_and_a_picture(
    shop: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, picture = tmp_path / "new" / "found.html", tmp_path / "found.png"
    written = ["--html", str(page), "--png", str(picture), "--json"]
    asked = ["sofa", "--image", str(photo), "--box", "10,10,50,50", "--category", QUOTED]
    main(["--index", str(shop), *asked, *written])
    told = json.loads(capsys.readouterr().out)
    assert {hit["product"] for hit in told["hits"]} == {"p5", "p11"}
    assert told["photo"]["width"] == 80 and told["photo"]["regions"]
    text = page.read_text(encoding="utf-8")
    assert "O&#x27;Brien &quot;x&quot;" in text and "http://" not in text and "https://" not in text
    assert text.count('class="box matched"') == 3 and text.count('class="box asked"') == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_nothing_fulfils_all_filters(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, picture = tmp_path / "found.html", tmp_path / "found.png"
    filters = ["--attribute", "colour=red", "--attribute", f"maker={QUOTED}"]
    main(["--index", str(shop), "sofa", *filters, "--html", str(page), "--png", str(picture)])
    assert "no hits" in capsys.readouterr().out
    assert "No hits" in page.read_text() and picture.is_file()


@pytest.mark.parametrize(
    ("flags", "said", "code"),
    [
        ([], "nothing is asked", 2),
        (["  "], "are blank", 2),
        (["x", "--limit", "0"], "limit=0", 2),
        (["x", "--limit", "many"], "whole number", 2),
        (["x", "--box", "1,2,3,4"], "without a photo", 2),
        (["x", "--image", "a.jpg", "--box", "1,2,3"], "four numbers are wanted", 2),
        (["x", "--attribute", "red"], "NAME=VALUE is wanted", 2),
        (["x", "--attribute", "a=1", "--attribute", "a=2"], "given twice", 2),
        (["--image", "not there.jpg"], "not there.jpg", 1),
        (["x", "--category", "Things"], "near it: 'things'", 1),
        (["x", "--model", "nowhere"], "nowhere: no such folder", 1),
        (["x", "--device", "tpu"], "no such device", 1),
        (["x", "--html", "/proc/no/page.html"], "--html", 1),
        (["x", "--png", "/proc/no/page.png"], "--png", 1),
    ],
)
def test_a_mistake_is_one_line(
    shop: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str, code: int
) -> None:
    message, status = refused(capsys, "--index", str(shop), *flags)
    assert status == code and said in message and message.startswith("error: ")
    assert len(message.strip().splitlines()) == 1


def test_no_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, said in ((str(tmp_path / "typo"), "no such folder"), (" ", "--index is empty")):
        assert said in refused(capsys, "--index", index, "sofa")[0]
