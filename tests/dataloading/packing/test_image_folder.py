"""Finding a table's images: names of all kinds, links, what is outside; and whatever an image raises is a rejection."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from eclip.dataloading.errors import Rejection
from eclip.dataloading.packing import image_folder
from eclip.dataloading.packing.image_folder import ImageFolder, decoding_threads


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for path in (folder / "a.jpg", folder / "below" / "Grüße 椅子.jpg", tmp_path / "store" / "b.jpg"):
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 50)).save(path)
    (folder / "annexed.jpg").symlink_to(tmp_path / "store" / "b.jpg")
    (folder / "farm").symlink_to(tmp_path / "store")
    (folder / "inside.jpg").symlink_to("below/Grüße 椅子.jpg")
    (folder / "missing.jpg").symlink_to(tmp_path / "store" / "not fetched.jpg")
    (folder / "loop.jpg").symlink_to("loop2.jpg")
    (folder / "loop2.jpg").symlink_to("loop.jpg")
    os.mkfifo(folder / "pipe.jpg")
    os.link(folder / "a.jpg", os.fsencode(folder) + b"/latin-1 \xfc.jpg")
    return folder


def reason(folder: Path, name: str, **options) -> str:
    found = ImageFolder(folder=folder, **options).encode(name)
    if not isinstance(found, Rejection):
        assert found[1:] == (40, 50)
        return "used"
    assert (found.kind, found.where) == ("image", name)
    assert "photos" not in found.reason and "store" not in found.reason
    return found.reason


@pytest.mark.parametrize(
    "name, expected",
    [
        ("a.jpg", "used"),
        ("./below/../a.jpg", "used"),
        ("{photos}/a.jpg", "used"),
        ("below/Grüße 椅子.jpg", "used"),
        ("latin-1 \udcfc.jpg", "used"),
        ("inside.jpg", "used"),
        ("annexed.jpg", "a link to outside the image folder; allow with --follow-links"),
        ("farm/b.jpg", "a link to outside the image folder; allow with --follow-links"),
        ("../store/b.jpg", "outside the image folder"),
        ("{photos}/../store/b.jpg", "outside the image folder"),
        ("{photos}2/b.jpg", "outside the image folder"),
        ("/etc/passwd", "outside the image folder"),
        ("..", "outside the image folder"),
        ("nowhere.jpg", "file not found"),
        ("a.jpg/b.jpg", "cannot be read"),
        ("below", "not a regular file"),
        ("pipe.jpg", "not a regular file"),
        ("loop.jpg", "cannot be read"),
        ("loop.jpg/x.jpg", "cannot be read"),
        (".", "not a regular file"),
        ("nul\0.jpg", "no file can have this name"),
        ("lone \ud800.jpg", "no file can have this name"),
        ("x" * 300 + ".jpg", "cannot be read"),
        ("x/" * 3000 + ".jpg", "cannot be read"),
    ],
)
def test_names(photos: Path, name: str, expected: str) -> None:
    assert reason(photos, name.format(photos=photos)).startswith(expected)


def test_links_that_are_allowed(photos: Path) -> None:
    for name in ("annexed.jpg", "farm/b.jpg", "a.jpg"):
        assert reason(photos, name, follow_links=True) == "used"
    assert reason(photos, "missing.jpg", follow_links=True) == "file not found"
    assert reason(photos, "../store/b.jpg", follow_links=True) == "outside the image folder"
    assert ImageFolder(folder=photos).encode("annexed.jpg").detail.endswith("store/b.jpg")


def test_the_folder_may_itself_be_a_link_or_relative(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = photos.parent / "link"
    link.symlink_to(photos)
    monkeypatch.chdir(photos.parent)
    for folder in (link, Path("link"), Path("photos"), Path("photos/below/..")):
        for name in ("a.jpg", f"{link}/a.jpg" if "link" in str(folder) else "inside.jpg", f"{photos}/a.jpg"):
            assert reason(folder, name) == "used", (folder, name)
    assert reason(Path("link"), "../store/b.jpg") == "outside the image folder"


@pytest.mark.parametrize("error", [RuntimeError("Symlink loop"), PermissionError(13, "no"), MemoryError(), KeyError(1)])
def test_whatever_one_image_raises_is_a_rejection(photos: Path, monkeypatch: pytest.MonkeyPatch, error) -> None:
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(image_folder, "encode_image", fail)
    found = ImageFolder(folder=photos).encode("a.jpg")
    assert found.reason == "cannot be used" and found.detail.startswith(type(error).__name__)


def test_items_come_in_order_and_few_images_are_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def items() -> Iterator[tuple[int, list[str]]]:
        for i in range(40):
            asked.append(i)
            yield i, [f"{i}-{k}" for k in range(3)]

    def slow(self, name):
        time.sleep(0.002 * (hash(name) % 3))
        return name.encode(), 1, 1

    monkeypatch.setattr(ImageFolder, "encode", slow)
    with decoding_threads(3) as pool:
        for count, (item, encoded) in enumerate(ImageFolder(folder=Path()).encode_all(items(), pool, ahead=6)):
            assert item == count and [e[0] for e in encoded] == [f"{item}-{k}".encode() for k in range(3)]
            assert len(asked) <= count + 3
    assert len(asked) == 40
