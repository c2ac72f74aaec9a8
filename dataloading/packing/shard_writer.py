"""Write WebDataset shards: `<split>-000000.tar` ... with `<key>.json` and `<key>.000.jpg`, ... for each product."""

import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..schema import Product
from .shard_swap import RECORD, listed_tars, own, replace_shards, write_record

KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
"""A product's key: USTAR names end at 100 bytes, and in a tar a dot ends the key."""
Sample = tuple[Product, list[bytes]]
"""A product and its encoded images."""


def image_name(number: int) -> str:
    """Name of a product's image in its shard, without the key: "000.jpg"."""
    return f"{number:03d}.jpg"


def _check(product: Product, images: Sequence[bytes], seen: set[str]) -> None:
    key = product.key
    if not KEY.fullmatch(key):
        raise ValueError(f"key {key!r}: expected 1 to 80 letters, digits, '-' or '_' (in a tar a dot ends the key)")
    if key in seen:
        raise ValueError(f"key {key!r} occurs twice; keys are unique within a split")
    if len(images) != len(product.images) or not images:
        raise ValueError(f"{key}: {len(images)} images for {len(product.images)} records; give at least one, one each")
    for number, record in enumerate(product.images):
        if record.file != image_name(number):
            raise ValueError(f"{key}: record {number} is called {record.file!r}; expected {image_name(number)!r}")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    info = tarfile.TarInfo(name)  # mtime, owner and mode stay constant: equal content gives equal bytes
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    return 512 + -(-len(data) // 512) * 512


@contextmanager
def _new_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar that is whole and on the disk when the block ends; when it raises nothing more is written."""
    with path.open("wb") as file:
        tar = tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)
        yield tar
        tar.close()
        file.flush()
        os.fsync(file.fileno())


def write_tars(products: Iterable[Sample], folder: Path, split: str, *, max_bytes: int = 256 << 20) -> list[Path]:
    """Write products to `folder/<split>-NNNNNN.tar`, starting a new tar at `max_bytes`; return the tars in order.

    `folder` is one that nobody reads yet (`replace_shards`). Raises ValueError for bad keys, for records that do not
    match the images, and when there is no product.
    """
    seen: set[str] = set()
    written: list[Path] = []
    tar: tarfile.TarFile | None = None
    size = 0
    with ExitStack() as current:
        for product, images in products:
            _check(product, images, seen)
            seen.add(product.key)
            payload = product.to_json()
            if tar is None or size + sum(map(len, images)) + len(payload) > max_bytes:
                current.close()
                written.append(folder / f"{split}-{len(written):06d}.tar")
                tar, size = current.enter_context(_new_tar(written[-1])), 0
            size += _add(tar, f"{product.key}.json", payload)
            for number, data in enumerate(images):
                size += _add(tar, f"{product.key}.{image_name(number)}", data)
    if not written:
        raise ValueError(f"no product for split {split!r}")
    return written


def write_shards(products: Iterable[Sample], data_dir: Path, split: str, *, max_bytes: int = 256 << 20) -> list[Path]:
    """Replace one split of `data_dir` by products with their encoded images; the other splits stay. Returns its tars.

    The image files of a product must be named image_name(0), image_name(1), ... in its records. Waits while another
    packing is at work there. The old tars of the split and its index go when all new ones are complete; until then
    nothing changes. Raises ValueError for bad keys, for records that do not match the images, when there is no
    product, and when the disk is full.
    """
    with own(data_dir, wait=True), replace_shards(data_dir, only=split) as folder:
        try:
            tars = write_tars(products, folder, split, max_bytes=max_bytes)
        except ValueError as error:
            raise ValueError(f"{data_dir}: {error}; nothing was written") from error
        others = {n: size for n, size in (listed_tars(data_dir) or {}).items() if not n.startswith(f"{split}-")}
        write_record(folder, RECORD, {}, others=others)
    return [data_dir / tar.name for tar in tars]
