"""A catalogue for tests of training: twelve products of four images of noise, packed in no time."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from eclip.dataloading.packing import write_shards
from eclip.dataloading.schema import ImageRecord, Product


def write_twelve_products(folder: Path) -> Path:
    """Write the train split; returns `folder`."""
    write_shards([_product(i) for i in range(12)], folder, "train")
    return folder


def _product(number: int) -> tuple[Product, list[bytes]]:
    rng = np.random.default_rng(number)
    files = []
    for _ in range(4):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    title = f"{('red', 'blue', 'green')[number % 3]} {('sofa', 'lamp', 'desk', 'bed')[number % 4]} no {number}"
    images = tuple(
        ImageRecord(file=f"{i:03d}.jpg", source=("detail", "customer")[i % 2], width=40, height=40) for i in range(4)
    )
    return Product(key=f"p{number}", product=f"p{number}", title=title, category="things", images=images), files
