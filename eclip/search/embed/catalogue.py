"""What is embedded, in one fixed order: the images of packed shards, or of a table and a folder of images.

Both are a `Catalogue`: rows 0 .. len - 1, each a `Listing` that reads its image when it is asked. A fingerprint says
that two catalogues have the same rows in the same order, so that work that was stopped may go on.
"""

import hashlib
import json
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from eclip.dataloading.errors import Rejection
from eclip.dataloading.images import CorruptImageError, read_image_file
from eclip.dataloading.packing import Draft, ImageFolder, gather
from eclip.dataloading.shards import ShardIndex
from eclip.dataloading.tables import open_table
from eclip.search.embed.facts import image_attributes


@dataclass(frozen=True, kw_only=True)
class Listing:
    """One image of a product, with what the catalogue knows of it."""

    id: str
    product: str
    title: str
    category: str
    attributes: dict[str, Any]
    image: str
    """Where it lies: a file, or a member of a tar as TAR/member."""
    source: str
    read: Callable[[], bytes]
    """Raises CorruptImageError for this one image, DataError for a tar at fault."""


class Catalogue(Protocol):
    """Images in a fixed order."""

    name: str
    """For people: where it is from."""
    fingerprint: str
    """Equal where rows, order and facts are."""
    rejected: list[Rejection]
    """Rows of a table that could not be used."""

    def __len__(self) -> int: ...

    def listings(self, first: int, last: int) -> Iterator[Listing]:
        """Rows first .. last - 1."""


def splits_of(data_dir: Path) -> list[str]:
    """The splits packed in a folder; those of training first, others by name."""
    found = {path.name.rpartition("-")[0] for path in data_dir.glob("*-[0-9]*.tar")}
    usual = [split for split in ("train", "val", "test") if split in found]
    return [*usual, *sorted(found - set(usual))]


class ShardCatalogue:
    """Splits of packed shards, one after the other."""

    def __init__(self, data_dir: Path, splits: Sequence[str] = ()) -> None:
        """splits: all of the folder when empty. Raises ValueError, in one line, for a folder or a tar at fault."""
        there = splits_of(data_dir)
        if not data_dir.is_dir():
            raise ValueError(f"{data_dir}: no such folder; give the one that eclip pack wrote (--data)")
        for split in splits:
            if there and split not in there:
                raise ValueError(f"--split {split}: {data_dir} holds {', '.join(there)}; take one of these")
        self.indexes = [ShardIndex.open(data_dir, split) for split in dict.fromkeys(splits or there or ["train"])]
        self.name = f"{data_dir.resolve()} ({', '.join(index.split for index in self.indexes)})"
        told = [(index.split, index.fingerprint) for index in self.indexes]
        self.fingerprint = _digest(["shards", told])
        self.rejected: list[Rejection] = []

    def __len__(self) -> int:
        return sum(index.num_images for index in self.indexes)

    def listings(self, first: int, last: int) -> Iterator[Listing]:
        """Rows first .. last - 1."""
        start = 0
        for index in self.indexes:
            stop = start + index.num_images
            for row in range(max(first, start) - start, min(last, stop) - start):
                yield self._listing(index, row)
            start = stop

    def _listing(self, index: ShardIndex, row: int) -> Listing:
        p = index.product_of(row)
        product = index.product(p)
        file, key = index.image_file(row), index.image_key(row)
        record = next((image for image in product.images if image.file == file), None)
        sku = product.skus.get(record.sku, {}) if record is not None else {}
        tar = index.tars[int(index.product_shard[p])].resolve()
        return Listing(
            id=f"{index.split}/{key}",
            product=product.product,
            title=index.title(row),
            category=product.category,
            attributes=image_attributes(product.attributes, sku),
            image=f"{tar}/{'.'.join(key.rsplit('/', 1))}",
            source="detail" if record is None else record.source,
            read=partial(index.read_image, row),
        )


class TableCatalogue:
    """A table of products and the folder of their images, as packing reads them; nothing is packed."""

    def __init__(self, table: Path, images: Path, *, follow_links: bool = False, **options: Any) -> None:
        """options: of `open_table`. Raises ValueError, in one line, for a table or a folder that cannot be used."""
        self.folder = ImageFolder(folder=images, follow_links=follow_links)
        self.rejected: list[Rejection] = []
        opened = open_table(table, images, **options)
        self.summary = opened.summary()
        drafts = gather(opened.rows(self.rejected), table.name, self.rejected)
        if not drafts:
            raise ValueError(f"{table}: no product left ({len(self.rejected)} rows rejected)")
        self._rows = list(_unique(drafts))
        self.name = _shown(f"{table.resolve()} and {images.resolve()}")
        # Size and time of each file: a photo that was replaced or repaired makes another catalogue.
        facts = [[*_facts(*row), *self._stat(row[2][0])] for row in self._rows]
        self.fingerprint = _digest(["table", str(images.resolve()), facts])

    def __len__(self) -> int:
        return len(self._rows)

    def listings(self, first: int, last: int) -> Iterator[Listing]:
        """Rows first .. last - 1."""
        for name, draft, (path, _, source, title) in self._rows[first:last]:
            product = draft.product
            yield Listing(
                id=name,
                product=product.product,
                title=title or product.title,
                category=product.category,
                attributes=dict(product.attributes),
                image=_shown(str(self.folder.folder.resolve() / path)),
                source=source,
                read=partial(self._read, path),
            )

    def _read(self, path: str) -> bytes:
        return read_image_file(self.folder.locate(path))

    def _stat(self, path: str) -> tuple[int, int]:
        """Bytes and modification time (ns) of a file, -1 for one that is not there."""
        try:
            found = self.folder.locate(path).stat()
        except (OSError, CorruptImageError):
            return -1, -1
        return found.st_size, found.st_mtime_ns


_Image = tuple[str, str, str, str]
"""path, sku, source, title."""


def _unique(drafts: Sequence[Draft]) -> Iterator[tuple[str, Draft, _Image]]:
    """Each image with its id; one that a product lists several times, with other facts, is numbered.

    The id is part of a thumbnail's address, and browsers take "./" out of one.
    """
    for draft in drafts:
        seen: dict[str, int] = {}
        for image in draft.images:
            path = posixpath.normpath(image[0])
            count = seen[path] = seen.get(path, 0) + 1
            name = f"{draft.product.key}/{path}"
            yield (name if count == 1 else f"{name}#{count}"), draft, image


def _facts(name: str, draft: Draft, image: _Image) -> list[Any]:
    product = draft.product
    return [name, product.product, product.title, product.category, dict(product.attributes), *image]


def _shown(path: str) -> str:
    """A path as text that UTF-8 has, its other bytes escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _digest(facts: Any) -> str:
    text = json.dumps(facts, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
