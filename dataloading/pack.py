"""Write WebDataset shards: `<split>-000000.tar` ... with `<key>.json` and `<key>.000.jpg`, ... for each product.

`write_shards` is the format. The command packs a user's own catalogue (a table and a folder of images):

    python -m eclip.dataloading.pack --table catalog.csv --images photos/ --out data/shop --val 0.05 --test 0.05

The table has one row an image (CSV with a header, or JSON lines). Columns: `product`, `title`, `category` and `image` are
required, `sku`, `source`, `catalog`, `title_<language>` and `attribute_<name>` are read when present; several images may
stand in one row, separated by `|` (in JSON lines: a list).
"""

import io
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

from .schema import Product

_KEY = re.compile(r"[A-Za-z0-9_-]+")


def image_name(number: int) -> str:
    """Name of a product's image in its shard, without the key: "000.jpg"."""
    return f"{number:03d}.jpg"


def _check(product: Product, images: list[bytes], seen: set[str]) -> None:
    if not _KEY.fullmatch(product.key):
        raise ValueError(f"key {product.key!r} is not made of letters, digits, '-' and '_'; a dot would end the key in a tar")
    if product.key in seen:
        raise ValueError(f"key {product.key!r} occurs twice; keys are unique within a split")
    if len(images) != len(product.images) or not images:
        raise ValueError(f"{product.key}: {len(images)} images for {len(product.images)} records; at least one, one record each")
    for number, record in enumerate(product.images):
        if record.file != image_name(number):
            raise ValueError(f"{product.key}: record {number} is called {record.file!r}; expected {image_name(number)!r}")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    info = tarfile.TarInfo(name)  # mtime, owner and mode stay constant: equal content gives equal bytes
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    return 512 + -(-len(data) // 512) * 512


def write_shards(
    products: Iterable[tuple[Product, list[bytes]]], data_dir: Path, split: str, *, max_bytes: int = 256 << 20
) -> list[Path]:
    """Write products with their encoded images to `data_dir/<split>-NNNNNN.tar`, starting a new tar at `max_bytes`.

    Tars are complete when they get their names; older shards of the split (and its index) are removed once all new
    ones are written. Returns the tars in order. Raises ValueError for bad keys and for records that do not match
    the images.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    written: list[Path] = []
    tar: tarfile.TarFile | None = None
    size = 0
    try:
        for product, images in products:
            _check(product, images, seen)
            seen.add(product.key)
            payload = product.to_json()
            need = sum(map(len, images)) + len(payload)
            if tar is None or size + need > max_bytes:
                if tar is not None:
                    tar.close()
                written.append(data_dir / f"{split}-{len(written):06d}.tar.part")
                tar, size = tarfile.open(written[-1], "w", format=tarfile.USTAR_FORMAT), 0
            size += _add(tar, f"{product.key}.json", payload)
            for number, data in enumerate(images):
                size += _add(tar, f"{product.key}.{image_name(number)}", data)
    except BaseException:
        if tar is not None:
            tar.close()
        for part in written:
            part.unlink(missing_ok=True)
        raise
    if tar is None:
        raise ValueError(f"no products for split {split!r} in {data_dir}: nothing was written")
    tar.close()
    for old in [*data_dir.glob(f"{split}-[0-9]*.tar"), data_dir / f"{split}.index.npz"]:
        old.unlink(missing_ok=True)
    return [part.rename(part.with_suffix("")) for part in written]
