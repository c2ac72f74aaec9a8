"""A small shop's table and photos, and what a packing made of them: for the tests of packing."""

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def photo(path: Path, width: int = 60, height: int = 40, **options) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(path, **options)
    return path


def shop(folder: Path, products: int = 12) -> tuple[Path, Path]:
    """A table of `products` products with a detail and a customer image each, and some rows that cannot be used."""
    images = folder / "photos"
    images.mkdir()
    rows = []
    for p in range(products):
        for source in ("detail", "customer"):
            photo(images / f"{p}-{source}.png")
            rows.append(
                {
                    "product": f"Ref. {p}" if p == 0 else f"ref{p}",
                    "title": f"Chair number {p}, {source}",
                    "category": "Chairs",
                    "image": f"{p}-{source}.png",
                    "source": source,
                    "sku": f"sku{p}",
                    "title_de": f"Stuhl {p}",
                    "attribute_colour": "red",
                }
            )
    good = rows[0]
    rows += [
        {**good, "product": "untitled", "title": ""},
        {**good, "source": "billboard"},
        {**good, "category": "Tables"},
        {**good, "product": "lost", "image": "lost.png"},
        {**good, "product": "outside", "image": "../table.csv"},
    ]
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(good))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "table.csv", images


def simple(folder: Path, products: int = 12, *, image: str = "a.png", name: str = "t.jsonl") -> Path:
    """A table of JSON lines whose products p0, p1, ... all have the one image; the folder is its image folder."""
    photo(folder / "a.png")
    rows = [{"product": f"p{i}", "title": "A chair", "category": "C", "image": [image]} for i in range(products)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def listed(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".pack.lock"}


def split_keys(folder: Path) -> dict[str, set[str]]:
    tars = sorted(folder.glob("*.tar"))
    return {t.name.split("-")[0]: {n.split(".")[0] for n in members(t)} for t in tars}
