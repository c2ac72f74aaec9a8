"""Small tables on disk beside a folder of empty image files: reading tables looks only whether those are there."""

from pathlib import Path
from typing import Any

import pytest

from eclip.dataloading.errors import Rejection
from eclip.dataloading.tables.table import Row, Table, open_table

HEADER = "product,title,category,image\n"
GOOD = "P1,Red chair,Chairs,a.jpg\n"


def image_folder(folder: Path, names: str = "a.jpg b.jpg c.jpg d.jpg") -> Path:
    """The folder `photos` with these files."""
    photos = folder / "photos"
    photos.mkdir(exist_ok=True)
    for name in names.split():
        (photos / name).touch()
    return photos


def table_of(folder: Path, content: str | bytes, name: str = "t.csv", **options: Any) -> Table:
    """An opened table of this content (text: UTF-8, line ends as they are)."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return open_table(path, image_folder(folder), **options)


def read(folder: Path, content: str | bytes, name: str = "t.csv", **options: Any) -> tuple[list[Row], list[Rejection]]:
    """The rows of a table of this content, and those left out."""
    rejected: list[Rejection] = []
    return list(table_of(folder, content, name, **options).rows(rejected)), rejected


def refusal(folder: Path, content: str | bytes, name: str = "t.csv", **options: Any) -> str:
    """The one line with which a table of this content is refused."""
    with pytest.raises(ValueError) as error:
        read(folder, content, name, **options)
    line = str(error.value)
    assert len(line.splitlines()) == 1 and line.isprintable(), line
    return line
