"""Listings to rows of the table: decode in threads beside the model, one pass of the tower, two of the decoder.

Letters: n images of a batch, D embedding width, N patches.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eclip.dataloading.images import CorruptImageError, plain_bytes
from eclip.inference import EncodedImages, Encoder, TrainedModel, read_picture
from eclip.inference.encoding import IMAGE, TEXT
from eclip.inference.pictures import to_jpeg
from eclip.inference.regions import find_regions
from eclip.search.embed.catalogue import Listing
from eclip.search.embed.facts import as_json, facets, price
from eclip.search.embed.schema import GLOBAL, INSTANCE_IMAGE, INSTANCE_TITLE, TITLE, table_schema

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 64
"""Images at a time, as evaluation takes them."""
_AHEAD = 2  # batches that are decoded beside the one in the model


@dataclass(frozen=True)
class Decoded:
    """An image that could be read."""

    listing: Listing
    square: Tensor
    """(3, S, S) uint8."""
    size: tuple[int, int]
    thumbnail: bytes


@dataclass
class Rows:
    """Rows of the table so far, and the images that were left out."""

    columns: dict[str, list[Any]] = field(default_factory=dict)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Id and reason."""

    def add(self, **values: Any) -> None:
        """One row."""
        for name, value in values.items():
            self.columns.setdefault(name, []).append(value)


class Embedder:
    """A model that makes rows."""

    def __init__(self, model: TrainedModel, *, thumbnail: int, workers: int) -> None:
        """thumbnail: its longer side, pixels. workers: decoding threads."""
        self.encoder: Encoder = model.encoder
        self.threshold, self.thumbnail, self.workers = model.threshold, thumbnail, workers

    def rows(self, listings: Iterable[Listing], tick: Callable[[int], Any]) -> Rows:
        """Embed them all. tick: told how many are done since. Raises ValueError for vectors that are not finite, and
        what reading a shard raises."""
        rows = Rows()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for batch in self._decoded(listings, pool):
                    good = [one for one in batch if isinstance(one, Decoded)]
                    rows.rejected += [one for one in batch if not isinstance(one, Decoded)]
                    if good:
                        self._embed(good, rows)
                    tick(len(batch))
            finally:
                pool.shutdown(cancel_futures=True)
        return rows

    def table(self, rows: Rows) -> "pa.Table":
        """Rows as Arrow, in full width."""
        import pyarrow as pa

        encoder = self.encoder
        schema = table_schema(encoder.embed_dim, has_decoder=encoder.has_decoder)
        arrays = []
        for column in schema:
            values = rows.columns.get(column.name, [])
            if pa.types.is_fixed_size_list(column.type):
                flat = np.concatenate(values).astype(np.float32) if values else np.zeros(0, np.float32)
                arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), column.type.list_size))
            else:
                arrays.append(pa.array(values, column.type))
        return pa.Table.from_arrays(arrays, schema=schema)

    def decode(self, listing: Listing) -> Decoded | tuple[str, str]:
        """Read one image, in any thread; what is wrong with it is said and not raised."""
        try:
            data = listing.read()
            pixels = read_picture(data, self.encoder.image_size)
            return Decoded(listing, pixels.square, pixels.size, self._thumbnail(data, pixels.size))
        except CorruptImageError as error:
            return listing.id, str(error)

    def _thumbnail(self, data: bytes, size: tuple[int, int]) -> bytes:
        """A small JPEG that has nothing but pixels is its own thumbnail."""
        if max(size) <= self.thumbnail and data.startswith(b"\xff\xd8\xff") and plain_bytes(data):
            return data
        return to_jpeg(data, self.thumbnail)

    def _decoded(
        self, listings: Iterable[Listing], pool: ThreadPoolExecutor
    ) -> Iterator[list[Decoded | tuple[str, str]]]:
        """Batches in order; two more are in work meanwhile."""
        waiting: deque[list[Future[Decoded | tuple[str, str]]]] = deque()
        coming = iter(listings)
        while True:
            while len(waiting) <= _AHEAD and (batch := list(islice(coming, BATCH))):
                waiting.append([pool.submit(self.decode, listing) for listing in batch])
            if not waiting:
                return
            yield [future.result() for future in waiting.popleft()]

    def _embed(self, batch: list[Decoded], rows: Rows) -> None:
        encoded = self.encoder.images(torch.stack([one.square for one in batch]), [one.size for one in batch])
        vectors, maps = self.ask(encoded, [one.listing.title for one in batch])
        _require_finite(vectors, [one.listing.id for one in batch])
        for i, one in enumerate(batch):
            listing, (width, height) = one.listing, one.size
            rows.add(
                id=listing.id,
                product=listing.product,
                title=listing.title,
                category=listing.category,
                source=listing.source,
                attributes=as_json(listing.attributes),
                facets=facets(listing.attributes),
                price=price(listing.attributes),
                image=listing.image,
                width=width,
                height=height,
                thumbnail=one.thumbnail,
                **{name: vectors[name][i] for name in vectors},
                **{name: self.box(maps[name][i], one.size) for name in maps},
            )

    def ask(
        self, encoded: EncodedImages, titles: list[str]
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
        """Vectors (n, D) by column, and score maps (n, N) by the column of their box."""
        encoder = self.encoder
        place = {title: i for i, title in enumerate(dict.fromkeys(titles))}
        prompts = encoder.texts(list(place))[[place[title] for title in titles]]
        vectors = {GLOBAL: encoded.vectors, TITLE: F.normalize(prompts, dim=-1)}
        if not encoder.has_decoder:
            maps = {"box_title": encoder.cosine_maps(encoded, prompts)}
            return _all_numpy(vectors), _all_numpy(maps)
        own = encoder.instances(encoded, encoded.features.cls, IMAGE)
        titled = encoder.instances(encoded, prompts, TEXT)
        vectors |= {INSTANCE_IMAGE: own.vectors, INSTANCE_TITLE: titled.vectors}
        maps = {"box_image": own.maps, "box_title": titled.maps}
        return _all_numpy(vectors), _all_numpy(maps)

    def box(self, scores: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
        """The heaviest region of a map (N,): x0, y0, x1, y1 in pixels of an image of `size`."""
        side = self.encoder.image_size
        region = find_regions(scores, size, side=side, threshold=self.threshold, limit=1)[0]
        return np.asarray(region.box, np.float32)


def _all_numpy(values: dict[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    return {name: value.float().cpu().numpy() for name, value in values.items()}


def _require_finite(vectors: dict[str, NDArray[np.float32]], names: list[str]) -> None:
    good = np.all([np.isfinite(values).all(axis=1) for values in vectors.values()], axis=0)
    bad = [name for name, fine in zip(names, good, strict=True) if not fine]
    if bad:
        shown = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise ValueError(
            f"vectors of {len(bad)} of {len(names)} images are NaN or infinite ({shown}): the checkpoint is damaged or "
            f"its training diverged; take an earlier checkpoint or another run"
        )
