"""What is asked and what is answered: Query and its Filters, Answer and its Hits."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from eclip.dataloading.schema import Box
from eclip.inference import Picture, Region


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which rows may answer: all that is given must hold. Names are compared as they are written in the catalogue."""

    category: str | None = None
    attributes: Mapping[str, str | int | bool] = field(default_factory=dict)
    """Name to value, {"color": "red"}; True is "yes", as the catalogue's facets have it."""
    source: str | None = None
    """Kind of the image: customer, detail, ..."""
    price_min: float | None = None
    """A product without a price lies in no range."""
    price_max: float | None = None

    def __post_init__(self) -> None:
        for name in ("price_min", "price_max"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name}={value}: a price is a finite number")
        if self.price_min is not None and self.price_max is not None and self.price_min > self.price_max:
            raise ValueError(f"price_min={self.price_min} above price_max={self.price_max}: no price lies there")
        for name in ("category", "source"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name}={value!r}: a text is wanted")
            if value is not None and not value.strip():
                raise ValueError(f"{name}={value!r} is blank: leave it out, or name one")
        for attribute, value in self.attributes.items():
            if not isinstance(value, str | int):
                raise TypeError(f"attribute {attribute!r}={value!r}: a text, a whole number or a bool is wanted")
            if not attribute.strip():
                raise ValueError(f"attribute {attribute!r}={value!r}: its name is blank")


@dataclass(frozen=True, kw_only=True)
class Query:
    """One question: by words, by a photo or a box of it, or by both: then the words say which object is meant."""

    words: str | None = None
    image: Picture | None = None
    box: Box | None = None
    """x0, y0, x1, y1 in pixels of the upright photo: the object that is meant."""
    filters: Filters = field(default_factory=Filters)
    limit: int = 10
    """Hits at most; larger than the catalogue is all of it."""
    hybrid: bool = False
    """The words also by full text on the titles; both rankings fused by reciprocal ranks."""
    rerank: int = 0
    """So many of the first hits, at least `limit`, are put in order with the help of the matching head; 0: none."""
    fold: bool = True
    """A product appears once, by its best image; otherwise every image is a hit of its own."""
    locate: bool | None = None
    """Look for the words in every picture that is shown, instead of taking the box that was stored with it, which is
    that of the picture's own title. Takes the model a pass over `limit` thumbnails. None: no."""

    def __post_init__(self) -> None:
        if self.words is None and self.image is None:
            raise ValueError("nothing is asked: give words, a photo or both")
        if self.words is not None and not self.words.strip():
            raise ValueError(f"words={self.words!r} are blank: name what is looked for, or leave them out")
        if self.box is not None and self.image is None:
            raise ValueError(f"box={self.box} without a photo: a box is a part of a photo")
        if self.hybrid and self.words is None:
            raise ValueError("hybrid without words: full text is asked by words")
        if self.locate and self.words is None:
            raise ValueError("locate without words: it looks for the words in the pictures found")
        if self.limit < 1:
            raise ValueError(f"limit={self.limit}: ask for at least one hit")
        if self.rerank and self.words is None:
            raise ValueError("rerank without words: the matching head compares pictures with words")
        if self.rerank and self.rerank < self.limit:
            raise ValueError(f"rerank={self.rerank}: use 0, or at least limit={self.limit}")


@dataclass(frozen=True, kw_only=True)
class Hit:
    """An image of the catalogue that answers."""

    id: str
    product: str
    title: str
    category: str
    attributes: Mapping[str, Any]
    price: float | None
    score: float
    """Larger is better; what it is, `Answer.scored_by` says."""
    box: Box | None
    """The region that matched, x0, y0, x1, y1 in pixels of width x height; None where the model has no regions."""
    width: int
    """Of the upright image, pixels."""
    height: int
    image: str
    """Where the image lies."""
    source: str
    """Its kind: customer, detail, ..."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The hits, best first."""

    hits: list[Hit]
    scored_by: str
    """cosine, reciprocal rank fusion, or cosine and matching head."""
    photo_size: tuple[int, int] | None = None
    """Width and height of the upright photo that was asked with, pixels."""
    photo_regions: list[Region] = field(default_factory=list)
    """The part of the photo that was taken for what is asked, the heaviest first."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Where the time went: prepare (checks and decoding), model, index, rerank, rows, locate; of a batch, model is
    that of all."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON; regions without their maps."""
        photo = None
        if self.photo_size is not None:
            regions = [{"box": list(region.box), "score": region.score} for region in self.photo_regions]
            photo = {"width": self.photo_size[0], "height": self.photo_size[1], "regions": regions}
        return {
            "hits": [hit.to_dict() for hit in self.hits],
            "scored_by": self.scored_by,
            "photo": photo,
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
        }
