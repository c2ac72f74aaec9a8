"""What is asked to vectors: the photo of a question is decoded (`decode`), many go through the model (`ask`).

Which vector is compared with which column stands in `ask`; what each choice was measured to give, in README.md, Ask.
Letters: D embedding width, S side of the model's square.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eclip.dataloading.images import widen
from eclip.dataloading.schema import Box
from eclip.inference import EncodedImages, Region, TrainedModel, describe, read_picture
from eclip.inference.encoding import IMAGE, TEXT, Instances
from eclip.inference.pictures import Pixels
from eclip.inference.regions import find_regions
from eclip.inference.trained import BATCH, Vectors
from eclip.model.eclip import ImageFeatures
from eclip.search.embed.schema import GLOBAL, INSTANCE_IMAGE, INSTANCE_TITLE, TITLE
from eclip.search.query.query import Query

MARGIN = 0.15
"""Around a box that is asked: what is looked at is the square of 1.3 times its longer side (`widen`). The box itself
finds less; a margin of 15% of each side finds a point more of a photo's main product, and much less of smaller ones."""
_REGIONS = 3


@dataclass(frozen=True)
class Prepared:
    """A question that was checked, its photo decoded: nothing of it can fail any more by the user's fault."""

    query: Query
    photo: Pixels | None
    seconds: float = 0.0
    """What checking and decoding took."""

    @property
    def area(self) -> Box | None:
        """The part of the photo that the model looks at, in its pixels."""
        if self.photo is None:
            return None
        width, height = self.photo.size
        if self.query.box is None:
            return 0.0, 0.0, float(width), float(height)
        return widen(self.query.box, self.photo.size, MARGIN)


@dataclass(frozen=True)
class Asked:
    """What the table is asked."""

    vector: Vectors
    """(D,) of unit length."""
    columns: tuple[str, ...]
    """What it is compared with: a column of vectors, or the sum of two."""
    box: str | None
    """The column of the box that belongs to them."""
    words: Tensor | None = None
    """(D,) the words' feature, not normalised."""
    regions: list[Region] = field(default_factory=list)
    """Of the photo."""


def decode(query: Query, size: int) -> Pixels | None:
    """The photo of a question, or the box of it with its margin. Raises ValueError for one that cannot be read."""
    if query.image is None:
        return None
    try:
        return read_picture(query.image, size, query.box, margin=MARGIN)
    except (ValueError, TypeError) as error:
        raise ValueError(f"photo ({describe(query.image)}): {error}") from error


def ask(model: TrainedModel, prepared: Sequence[Prepared], columns: set[str]) -> list[Asked]:
    """Vectors of questions: one pass of the text tower, and of the image tower one a batch of 32 photos.

    columns: of the table. Words meet the sum of a title's feature (`text`) and of what the image shows of its title:
    where titles are good, they tell nearly all. A photo, or a box of it, is its own prompt on both sides, which finds
    more than global vectors. Words with a photo prompt it; the instance and the words' feature together are asked,
    against the same sum.
    """
    texts = list(dict.fromkeys(p.query.words for p in prepared if p.query.words is not None))
    features = dict(zip(texts, model.text_features(texts), strict=True)) if texts else {}
    asked: list[Asked | None] = [
        _ask_words(model, features[p.query.words], columns) if p.photo is None and p.query.words is not None else None
        for p in prepared
    ]
    photos = [place for place, p in enumerate(prepared) if p.photo is not None]
    for start in range(0, len(photos), BATCH):
        places = photos[start : start + BATCH]
        found_ones = _ask_photos(model, [prepared[i] for i in places], features, columns)
        for place, found in zip(places, found_ones, strict=True):
            asked[place] = found
    found_all = [found for found in asked if found is not None]
    assert len(found_all) == len(prepared)  # each has words or a photo (Query)
    return found_all


def _ask_words(model: TrainedModel, feature: Tensor, columns: set[str]) -> Asked:
    return Asked(_numpy(F.normalize(feature.float(), dim=-1)), _of_titles(columns), "box_title", feature)


def _of_titles(columns: set[str]) -> tuple[str, ...]:
    """What stands for a product and its title, of the columns of a table."""
    return tuple(name for name in (INSTANCE_TITLE, TITLE) if name in columns) or (GLOBAL,)


def _ask_photos(
    model: TrainedModel, prepared: Sequence[Prepared], features: dict[str, Tensor], columns: set[str]
) -> list[Asked]:
    pixels = [p.photo for p in prepared if p.photo is not None]
    encoded = model.encoder.images(torch.stack([p.square for p in pixels]), [p.size for p in pixels])
    if not model.encoder.has_decoder:
        return [Asked(vector, (GLOBAL,), None) for vector in _numpy(encoded.vectors)]
    asked: dict[int, Asked] = {}
    alone = [i for i, p in enumerate(prepared) if p.query.words is None]
    if alone:
        part = _part(encoded, alone)
        found = model.encoder.instances(part, part.features.cls, IMAGE)
        places = _regions(model, prepared, alone, found)
        for i, vector, regions in zip(alone, _numpy(found.vectors), places, strict=True):
            asked[i] = Asked(vector, (INSTANCE_IMAGE,), "box_image", regions=regions)
    named = [(i, features[p.query.words]) for i, p in enumerate(prepared) if p.query.words is not None]
    if named:
        rows, words = [i for i, _ in named], torch.stack([feature for _, feature in named])
        found = model.encoder.instances(_part(encoded, rows), words, TEXT)
        vectors = _numpy(F.normalize(found.vectors + F.normalize(words, dim=-1), dim=-1))
        places = _regions(model, prepared, rows, found)
        for (i, feature), vector, regions in zip(named, vectors, places, strict=True):
            asked[i] = Asked(vector, _of_titles(columns), "box_title", feature, regions)
    return [asked[i] for i in range(len(prepared))]


def _part(encoded: EncodedImages, rows: Sequence[int]) -> EncodedImages:
    chosen = torch.tensor(rows, device=encoded.features.cls.device)
    features = ImageFeatures(encoded.features.cls[chosen], encoded.features.tokens[chosen])
    return EncodedImages(features, [encoded.sizes[row] for row in rows])


def _regions(
    model: TrainedModel, prepared: Sequence[Prepared], rows: Sequence[int], found: Instances
) -> list[list[Region]]:
    """Where in each photo the prompt is, in its pixels; row i of `found` is of prepared[rows[i]]."""
    regions = []
    for row, scores in zip(rows, _numpy(found.maps), strict=True):
        area = prepared[row].area
        assert area is not None
        regions.append(regions_of(model, scores, area, limit=_REGIONS))
    return regions


def regions_of(model: TrainedModel, scores: Vectors, area: Box, *, limit: int) -> list[Region]:
    """Regions of a map (N,) of the part `area` of an image, in pixels of that image."""
    x, y = area[:2]
    size = (area[2] - x, area[3] - y)
    side, threshold = model.encoder.image_size, model.threshold
    found = find_regions(scores, size, side=side, threshold=threshold, limit=limit)
    return [
        replace(region, box=(region.box[0] + x, region.box[1] + y, region.box[2] + x, region.box[3] + y))
        for region in found
    ]


def _numpy(tensor: Tensor) -> Vectors:
    return np.ascontiguousarray(tensor.float().cpu().numpy())
