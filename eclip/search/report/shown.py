"""What a page and a sheet show: the photo that was asked with and the hits, as JPEGs, boxes as shares of them."""

from dataclasses import dataclass

from eclip.dataloading.schema import Box
from eclip.inference.pictures import to_jpeg
from eclip.search.query import Answer, Hit, Query, Searcher

_SIDE = 384  # pixels of the photo that was asked with


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture and what stands under it."""

    jpeg: bytes
    boxes: tuple[tuple[str, Box], ...]
    """"asked" (the user's box) or "matched", each with x0, y0, x1, y1 in [0, 1]."""
    title: str
    details: str


def gather(searcher: Searcher, query: Query, answer: Answer) -> tuple[Shown | None, list[Shown]]:
    """The photo that was asked with, if there was one, and the hits."""
    hits = [
        Shown(
            jpeg=searcher.thumbnail(hit.id),
            boxes=() if hit.box is None else (("matched", _share(hit.box, hit.width, hit.height)),),
            title=hit.title,
            details=describe(hit),
        )
        for hit in answer.hits
    ]
    return _photo(query, answer), hits


def describe(hit: Hit) -> str:
    """Score, category, price, image."""
    price = [] if hit.price is None else [f"{hit.price:g}"]
    return " · ".join([f"{hit.score:.3f}", *([hit.category] if hit.category else []), *price, hit.id])


def asked_for(query: Query) -> str:
    """The question in a line."""
    what = [] if query.words is None else [f"“{query.words}”"]
    what += [] if query.image is None else ["a photo" if query.box is None else "a box of a photo"]
    filters = query.filters
    named: dict[str, str | float | None] = {"category": filters.category, "source": filters.source}
    named |= {**filters.attributes, "price from": filters.price_min, "price to": filters.price_max}
    return ", ".join([" in ".join(what), *(f"{name} {value}" for name, value in named.items() if value is not None)])


def _photo(query: Query, answer: Answer) -> Shown | None:
    if query.image is None or answer.photo_size is None:
        return None
    width, height = answer.photo_size
    matched = [("matched", _share(region.box, width, height)) for region in answer.photo_regions[:1]]
    asked = [] if query.box is None else [("asked", _share(query.box, width, height))]
    return Shown(
        jpeg=to_jpeg(query.image, _SIDE),
        boxes=(*asked, *matched),
        title="asked with this photo",
        details=f"{width} x {height} px",
    )


def _share(box: Box, width: int, height: int) -> Box:
    x0, y0, x1, y1 = (min(max(v / side, 0.0), 1.0) for v, side in zip(box, (width, height) * 2, strict=True))
    return x0, y0, x1, y1
