"""The model and the index behind the routes: photos are decoded in processes, the model is asked in batches.

Everything here is awaited, and ends by the time limit or with a Refusal. Letters: D embedding width, g patches along a
side.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch

from eclip.inference import EncodedImages, Region
from eclip.inference.encoding import IMAGE, TEXT
from eclip.inference.pictures import Pixels
from eclip.inference.trained import Vectors
from eclip.search.query import Answer, NoSuchImage, Prepared, Query, Searcher, UnreadableIndex
from eclip.search.query.asking import MARGIN, regions_of
from eclip.serve.asked import Place
from eclip.serve.batching import Batcher
from eclip.serve.decoding import DecodePool
from eclip.serve.limits import Limits, Refusal

T = TypeVar("T")
Asks = TypeVar("Asks", bound=Callable[..., Coroutine[Any, Any, Any]])


def in_time(ask: Asks) -> Asks:
    """A method of Service that has `limits.seconds` for all its steps together, then 504."""

    @wraps(ask)
    async def limited(service: "Service", *args: Any) -> Any:
        seconds = service.limits.seconds
        try:
            return await asyncio.wait_for(ask(service, *args), seconds)
        except asyncio.TimeoutError:
            raise Refusal(504, f"no answer within {seconds:g} s; ask again, or for less") from None

    return cast(Asks, limited)


@dataclass(frozen=True)
class Located:
    """Where in a picture something is."""

    size: tuple[int, int]
    """Width and height of the picture, pixels."""
    regions: list[Region]
    """The heaviest first, in its pixels; each has the map (g, g)."""


class Service:
    """A searcher for many clients at once."""

    def __init__(self, searcher: Searcher, limits: Limits, *, batch: int = 32, window: float = 0.0) -> None:
        """batch: questions that the model takes together, at most; window: see `Batcher`."""
        self.searcher, self.limits = searcher, limits
        self.model = searcher.model
        self.batcher: Batcher[Prepared, Answer] = Batcher(
            searcher.search_many, most=batch, pending=limits.pending, window=window
        )
        workers = max(1, min(4, len(os.sched_getaffinity(0))))
        self.decoders = DecodePool(self.model.encoder.image_size, limits, workers=workers)

    def close(self) -> None:
        """Answer what was asked, and end threads and processes."""
        self.batcher.close()
        self.decoders.close()

    def health(self) -> dict[str, Any]:
        """What /healthz tells."""
        facts = self.searcher.table.facts
        return {"status": "ok", "rows": facts.rows, "products": facts.products, "model": Path(self.model.source).name}

    @in_time
    async def facets(self) -> dict[str, Any]:
        """What can be filtered by."""
        return await asyncio.to_thread(self.searcher.facets)

    @in_time
    async def thumbnail(self, image_id: str) -> bytes:
        """JPEG. Refusal 404 for an id that no row has."""
        return bytes((await self._row(image_id, ["thumbnail"]))["thumbnail"])

    @in_time
    async def search(self, query: Query) -> Answer:
        """The answer to a question whose image, if it has one, is bytes."""
        photo = None
        if isinstance(query.image, bytes):
            photo = await asyncio.wrap_future(self.decoders.decode(query.image, query.box, margin=MARGIN))
        try:
            prepared = await asyncio.to_thread(self.searcher.prepare, query, photo)
        except UnreadableIndex:
            raise
        except ValueError as error:
            # What lacks in the index is said of it by its place, which is no client's business.
            raise Refusal(422, str(error).replace(f"{self.searcher.table.index}: ", "")) from None
        return await asyncio.wrap_future(self.batcher.submit(prepared))

    @in_time
    async def locate(self, place: Place, limit: int) -> Located:
        """Where in a picture of the index, or in a photo, is what words or an exemplar name."""
        if place.photo is not None:
            picture = await asyncio.wrap_future(self.decoders.decode(place.photo))
            size = picture.size
        else:
            row = await self._row(place.id or "", ["thumbnail", "width", "height"])
            picture = await asyncio.wrap_future(self.decoders.decode(bytes(row["thumbnail"])))
            size = row["width"], row["height"]
        exemplar = None
        if place.exemplar is not None:
            exemplar = await asyncio.wrap_future(self.decoders.decode(place.exemplar, place.box, margin=MARGIN))
        work = partial(self._regions, picture, size, place.words, exemplar, limit)
        return Located(size, await asyncio.wrap_future(self.batcher.call(work)))

    @in_time
    async def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """(m, D) unit vectors."""
        return await asyncio.wrap_future(self.batcher.call(lambda: self.model.embed_texts(texts)))

    @in_time
    async def embed_photos(self, photos: Sequence[bytes], prompts: Sequence[str]) -> Vectors:
        """(n, D) unit vectors, of the whole photos or, with as many prompts, of what those name."""
        # Decoded one after another: one client's photos leave decoders to others.
        pixels = [await asyncio.wrap_future(self.decoders.decode(photo)) for photo in photos]
        return await asyncio.wrap_future(self.batcher.call(lambda: self._embed(pixels, prompts)))

    async def _row(self, image_id: str, columns: list[str]) -> dict[str, Any]:
        try:
            return await asyncio.to_thread(self.searcher.row, image_id, columns)
        except NoSuchImage:
            raise Refusal(404, f"no image {image_id[:100]!r} in the index") from None

    @torch.inference_mode()
    def _regions(
        self, picture: Pixels, size: tuple[int, int], words: str | None, exemplar: Pixels | None, limit: int
    ) -> list[Region]:
        encoder, encoded = self.model.encoder, self._encode([picture])
        if exemplar is not None:
            prompt, modality = self._encode([exemplar]).features.cls, IMAGE
        else:
            # Not `prompt_features`, which asks the file system whether a text names a file.
            prompt, modality = self.model.text_features([words or ""]), TEXT
        maps = encoder.maps(encoded, prompt, modality)
        area = (0.0, 0.0, float(size[0]), float(size[1]))
        return regions_of(self.model, maps[0].float().cpu().numpy(), area, limit=limit)

    @torch.inference_mode()
    def _embed(self, pixels: Sequence[Pixels], prompts: Sequence[str]) -> Vectors:
        encoded = self._encode(pixels)
        if not prompts:
            return np.asarray(encoded.vectors.cpu().numpy())
        features = self.model.text_features(prompts)
        return np.asarray(self.model.encoder.instances(encoded, features, TEXT).vectors.float().cpu().numpy())

    def _encode(self, pixels: Sequence[Pixels]) -> EncodedImages:
        return self.model.encoder.images(torch.stack([p.square for p in pixels]), [p.size for p in pixels])


