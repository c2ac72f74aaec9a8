"""The index of a packed split: where every image lies in the tars, and the facts that sampling needs.

Shards are plain WebDataset tars `<split>-000000.tar`, ...: a sample is the members sharing the part of their name
before the first dot, `<key>.json` and its images `<key>.000.jpg`, ... One scan of the tar headers (tars/members.py) and
the JSONs gives an index of about 40 bytes an image, kept beside the tars as `<split>.index.npz` and built again when a
tar changes. Images are then read by offset, one `pread` each, in any order and from any process (tars/open_tars.py).

The scan is also the check before training: a missing, truncated or overwritten tar, an empty catalogue, a JSON without
a title raise ValueError in one line that names the file and the rule.
"""

import contextlib
import hashlib
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .errors import DataError
from .packing import require_finished
from .schema import SOURCES, ImageRecord, Product
from .tars import IMAGE_SUFFIXES, OpenTars, Span, is_image, is_json, read_samples

log = logging.getLogger(__name__)

_VERSION = 2


def stable_hash(text: str) -> int:
    """63-bit hash of a string, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class _Strings:
    """Many strings as one UTF-8 blob: a list of Python strings costs 50 bytes each more, in every worker."""

    def __init__(self, blob: NDArray[np.uint8], ends: NDArray[np.int64]):
        self.blob, self.ends = blob, ends

    @classmethod
    def pack(cls, strings: Sequence[str]) -> "_Strings":
        encoded = [s.encode() for s in strings]
        ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        start = self.ends[i - 1] if i else 0
        return self.blob[start : self.ends[i]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


def _instead(data_dir: Path) -> str:
    """What is there instead of a split's tars, or how they come there."""
    others = sorted(path.name for path in data_dir.glob("*.t*") if re.search(r"\.(tar|tgz)", path.name))
    if others:
        more = ", ..." if len(others) > 3 else ""
        return f"it holds {', '.join(others[:3])}{more}: shards are plain tars, numbered from 0 behind the split's name"
    return f"pack the catalogue there first (python -m eclip.dataloading.demo --out {data_dir} writes the embedded one)"


def find_tars(data_dir: Path, split: str) -> list[Path]:
    """The tars of a split in order.

    Raises ValueError when there is none, when a number is left out, and when a packing was killed half way.
    """
    require_finished(data_dir)
    pattern = re.compile(rf"{re.escape(split)}-(\d+)\.tar")
    found: dict[int, Path] = {}
    for path in sorted(data_dir.glob(f"{split}-*.tar")):
        if match := pattern.fullmatch(path.name):
            other = found.setdefault(int(match[1]), path)
            if other != path:
                raise ValueError(f"{path}: has the number of {other.name}; give each tar its own")
    if not found:
        raise ValueError(f"{data_dir}: no {split}-000000.tar; {_instead(data_dir)}")
    missing = sorted(set(range(max(found) + 1)) - found.keys())
    if missing:
        raise ValueError(
            f"{data_dir}: {split}-{missing[0]:06d}.tar is missing ({len(found)} of {max(found) + 1} tars found); "
            f"restore it or pack the split again"
        )
    return [found[i] for i in sorted(found)]


def _records(product: Product, members: Mapping[str, Span], where: str) -> list[tuple[ImageRecord, Span]]:
    """The images of a sample: those its JSON describes, in that order, then the tar's others with default facts."""
    small = {suffix.lower(): suffix for suffix in members}
    records = []
    left = {suffix: None for suffix in members if is_image(suffix)}
    for record in {record.file: record for record in product.images}.values():
        held = record.file if record.file in members else small.get(record.file.lower())
        if held is None:
            raise ValueError(f"{where}: describes image {record.file!r}, which the tar does not hold")
        if record.source not in SOURCES:
            raise ValueError(
                f"{where}: image {record.file!r} has source {record.source!r}; use one of {', '.join(SOURCES)}"
            )
        left.pop(held, None)
        records.append((record, members[held]))
    if not any(is_image(suffix) for suffix in members):
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(
            f"{where}: the product has no image; every product needs at least one, of {kinds} (its members: "
            f"{', '.join(list(members)[:3])})"
        )
    return [*records, *((ImageRecord(file=file), members[file]) for file in left)]


class _Builder:
    """Collects the columns of an index, one product at a time."""

    def __init__(self) -> None:
        self.columns: dict[str, list[int]] = {
            name: [] for name in (
                "product_shard", "json_offset", "json_size", "product_ids", "catalog_ids", "category", "num_images",
                "image_offset", "image_size", "image_source", "image_sku", "image_title", "image_file",
            )
        }  # fmt: skip
        self.keys: dict[str, int] = {}
        self.titles: dict[str, int] = {}
        self.files: dict[str, int] = {}
        self.categories: dict[str, int] = {}
        self.digest = hashlib.sha256()

    def add(self, shard: int, file: BinaryIO, path: Path, key: str, members: Mapping[str, Span]) -> None:
        where = f"{path}: {key}.json"
        span = next((span for suffix, span in members.items() if is_json(suffix)), None)
        if span is None:
            raise ValueError(
                f"{where} is missing; every sample needs its JSON next to its images (found: "
                f"{', '.join(f'{key}.{suffix}' for suffix in list(members)[:3])}; a key ends at the first dot)"
            )
        if key in self.keys:
            raise ValueError(f"{where}: the key occurs twice in the split; keys must be unique")
        file.seek(span[0])
        data = file.read(span[1])
        product = Product.from_json(data, where=where)
        records = _records(product, members, where)
        self.digest.update(data)
        self.keys[key] = len(self.keys)
        put = {
            "product_shard": shard, "json_offset": span[0], "json_size": span[1],
            "product_ids": stable_hash(product.product), "catalog_ids": stable_hash(product.catalog),
            "category": self.categories.setdefault(product.category, len(self.categories)), "num_images": len(records),
        }  # fmt: skip
        for name, value in put.items():
            self.columns[name].append(value)
        for record, (offset, size) in records:
            title = record.title.strip() or product.title
            put = {
                "image_offset": offset, "image_size": size,
                "image_source": SOURCES.index(record.source),
                "image_sku": stable_hash(record.sku or product.product),
                "image_title": self.titles.setdefault(title, len(self.titles)),
                "image_file": self.files.setdefault(record.file, len(self.files)),
            }  # fmt: skip
            for name, value in put.items():
                self.columns[name].append(value)

    def arrays(self) -> dict[str, NDArray]:
        """Columns and string tables, as they are saved."""
        wide = ("json_offset", "image_offset", "product_ids", "catalog_ids", "image_sku")
        out: dict[str, NDArray] = {
            name: np.array(values, np.int64 if name in wide else np.int32) for name, values in self.columns.items()
        }
        out["image_source"] = out["image_source"].astype(np.uint8)
        for name in ("keys", "titles", "files", "categories"):
            strings = _Strings.pack(list(getattr(self, name)))
            out[f"{name}_blob"], out[f"{name}_ends"] = strings.blob, strings.ends
        for name in ("image_offset", "image_size"):
            self.digest.update(out[name].tobytes())
        out["fingerprint"] = np.frombuffer(self.digest.digest()[:16], np.uint8)
        return out


def _stamp(tars: Sequence[Path]) -> NDArray[np.int64]:
    """(n, 2): size and time of change of each tar; an index is stale when they differ. Raises DataError."""
    return np.array([_facts(tar) for tar in tars], np.int64).reshape(-1, 2)


def _facts(tar: Path) -> tuple[int, int]:
    try:
        status = tar.stat()
    except OSError as error:
        target = f" ({os.readlink(tar)})" if tar.is_symlink() else ""
        why = f"a link to what is not there{target}; fetch it (git annex get, dvc pull)" if target else error.strerror
        raise DataError(f"{tar}: cannot be read: {why}") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{tar}: cannot be read: not a file but a directory, pipe or device")
    return status.st_size, status.st_mtime_ns


def _load(path: Path) -> dict[str, NDArray] | None:
    """A saved index, or None when there is none that this version can read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        expected = {"version": np.array(_VERSION), "stamp": _stamp([]), **_Builder().arrays()}
        return arrays if _kinds(arrays) == _kinds(expected) and arrays["version"] == _VERSION else None
    except Exception:  # of many kinds, by the kind of damage; the tars hold all that it holds
        return None


def _kinds(arrays: Mapping[str, NDArray]) -> dict[str, tuple[np.dtype, int]]:
    return {name: (array.dtype, array.ndim) for name, array in arrays.items()}


def _build(tars: Sequence[Path]) -> dict[str, NDArray]:
    builder = _Builder()
    stamp = _stamp(tars)
    for shard, path in enumerate(tars):
        try:
            with path.open("rb") as file:
                for key, members in read_samples(file, path).items():
                    builder.add(shard, file, path, key, members)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); copy or pack it again") from error
    if not builder.keys:
        raise ValueError(f"{tars[0]}: the catalogue is empty; pack at least one product")
    return {"version": np.array(_VERSION), "stamp": stamp, **builder.arrays()}


def _save(path: Path, arrays: Mapping[str, NDArray]) -> None:
    """Write beside the tars, whole or not at all: several ranks may do so at once."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(partial, path)
    except OSError as error:
        log.info("%s: not written (%s); the split is scanned again at every start", path, error)
        with contextlib.suppress(OSError):  # of a read-only disk, for a file that is not there
            partial.unlink()


class ShardIndex:
    """Products and images of one split. Rows number its images; product p has rows image_start[p]:image_start[p+1].

    Attributes: `num_products` P, `num_images` I; `image_start` (P+1,) int64; `product_ids`, `catalog_ids` (P,) int64
    stable hashes of their strings; `category_ids` (P,) int64 positions in `categories` (sorted); `product_shard` (P,)
    int32, the tar of each product; `image_source` (I,) uint8 positions in SOURCES; `image_sku`, `title_ids` (I,) int64
    stable hashes; `fingerprint`, of the JSONs and of every image's place and size.
    """

    def __init__(self, data_dir: Path, split: str, tars: Sequence[Path], arrays: Mapping[str, NDArray]):
        self.data_dir, self.split, self.tars = data_dir, split, tuple(tars)
        strings = {
            name: _Strings(arrays[f"{name}_blob"], arrays[f"{name}_ends"])
            for name in ("keys", "titles", "files", "categories")
        }
        self._keys, self._titles, self._files = strings["keys"], strings["titles"], strings["files"]
        self.num_products, self.num_images = len(arrays["product_ids"]), len(arrays["image_offset"])
        self.image_start = np.concatenate([[0], np.cumsum(arrays["num_images"], dtype=np.int64)])
        self.product_ids, self.catalog_ids = arrays["product_ids"], arrays["catalog_ids"]
        self.product_shard = arrays["product_shard"]
        found = list(strings["categories"])
        self.categories = sorted(found)
        place = {name: i for i, name in enumerate(self.categories)}
        self.category_ids = np.array([place[name] for name in found], np.int64)[arrays["category"]]
        self.image_source, self.image_sku = arrays["image_source"], arrays["image_sku"]
        self._image_title, self._image_file = arrays["image_title"], arrays["image_file"]
        self.title_ids = np.array([stable_hash(t) for t in self._titles], np.int64)[self._image_title]
        self._image_span = (arrays["image_offset"], arrays["image_size"])
        self._json_span = (arrays["json_offset"], arrays["json_size"])
        self.fingerprint = arrays["fingerprint"].tobytes().hex()
        self._open = OpenTars(self.tars, [(int(size), int(changed)) for size, changed in arrays["stamp"]])

    @classmethod
    def open(cls, data_dir: Path, split: str) -> "ShardIndex":
        """Read `<split>.index.npz`, building it when it is missing or older than the tars.

        Raises ValueError, in one line: a missing, truncated or damaged tar, no product, a JSON without a title.
        """
        data_dir = Path(data_dir)
        path = data_dir / f"{split}.index.npz"
        tars = find_tars(data_dir, split)
        arrays = _load(path)
        stamp = _stamp(tars)
        if arrays is not None:
            known = arrays["stamp"]
            # A repacked split has other sizes throughout; one that only lost its last tars has lost data.
            if len(known) > len(tars) and np.array_equal(known[: len(tars), 0], stamp[:, 0]):
                raise ValueError(
                    f"{data_dir}: {split}-{len(tars):06d}.tar is missing ({len(tars)} of {len(known)} tars found); "
                    f"restore it, or delete {path.name} if the split was made smaller on purpose"
                )
        if arrays is None or not np.array_equal(arrays["stamp"], stamp):
            arrays = _build(tars)
            _save(path, arrays)
        return cls(data_dir, split, tars, arrays)

    def title(self, row: int) -> str:
        """The title of an image: its own, or its product's."""
        return self._titles[self._image_title[row]]

    def texts(self) -> list[str]:
        """Every distinct title and category, in the order of the tars: what a vocabulary is trained on."""
        return list(dict.fromkeys([*self._titles, *self.categories]))

    def image_key(self, row: int) -> str:
        """Names an image in messages: "<key>/000.jpg"."""
        return f"{self._keys[self.product_of(row)]}/{self._files[self._image_file[row]]}"

    def image_file(self, row: int) -> str:
        """The name of an image within its sample, as in `ImageRecord.file`."""
        return self._files[self._image_file[row]]

    def product_of(self, row: int) -> int:
        """The product that an image belongs to."""
        return int(np.searchsorted(self.image_start, row, side="right")) - 1

    def product(self, p: int) -> Product:
        """The whole record of a product, read from its tar. Raises DataError when that has changed."""
        shard, name = int(self.product_shard[p]), f"{self._keys[p]}.json"
        data = self._open.read(shard, int(self._json_span[0][p]), int(self._json_span[1][p]), name)
        return Product.from_json(data, where=f"{self.tars[shard]}: {name}")

    def read_image(self, row: int) -> bytes:
        """The stored bytes of an image. Raises DataError when its tar was cut, replaced or deleted since."""
        shard = int(self.product_shard[self.product_of(row)])
        offset, size = int(self._image_span[0][row]), int(self._image_span[1][row])
        return self._open.read(shard, offset, size, self.image_key(row))

    def __repr__(self) -> str:
        return f"ShardIndex({self.data_dir}, {self.split!r}: {self.num_products} products, {self.num_images} images)"
