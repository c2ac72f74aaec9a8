"""What the first reading of a table finds out."""

import json
from pathlib import Path

from eclip.dataloading.errors import Rejection
from tests.dataloading.tables.table_files import read, refusal, table_of


def test_a_table_is_understood_by_rows_from_all_over_it(tmp_path: Path) -> None:
    """A column that is filled, and files that are there, late in the table only."""
    early = "".join(f"P{n},,Chair {n},lost{n}.jpg\n" for n in range(3000))
    late = "".join(f"P{n},Desk {n},x,a.jpg\n" for n in range(3000, 6000))
    table = table_of(tmp_path, "id,title,name,image\n" + early + late)
    rejected: list[Rejection] = []
    assert sum(1 for _ in table.rows(rejected)) == 3000 and len(rejected) == 3000
    assert "preferred to name" in "".join(table.summary())


def test_a_few_images_that_are_there_are_enough(tmp_path: Path) -> None:
    """As of a download that goes on: among those looked up first there is none."""
    lines = [f"P{n},Chair {n},{'a.jpg' if n == 150 else f'lost{n}.jpg'}\n" for n in range(1500)]
    table = table_of(tmp_path, "id,title,image\n" + "".join(lines))
    assert "1 of " in table.summary()[-1]


def test_a_column_of_marks_for_missing_values_is_empty(tmp_path: Path) -> None:
    line = {
        "id": 1,
        "title": float("nan"),
        "name": "Chair",
        "category": "None",
        "department": "Chairs",
        "image": "a.jpg",
    }
    (row,), _ = read(tmp_path, json.dumps(line), "t.jsonl")
    assert (row.title, row.category) == ("Chair", "Chairs")


def test_columns_are_missed_before_images(tmp_path: Path) -> None:
    assert "no column for title; " in refusal(tmp_path, "id,what,image\n1,2,lost.jpg\n")
    assert "no column for title and image; " in refusal(tmp_path, "id,what\n1,2\n")


def test_a_table_without_any_image_name_rejects_its_rows(tmp_path: Path) -> None:
    rows, rejected = read(tmp_path, "id,title,image\n1,a,\n2,b,nan\n")
    assert not rows and [r.reason for r in rejected] == ["no image", "no image"]
