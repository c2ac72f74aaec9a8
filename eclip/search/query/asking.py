"""What is asked to vectors: a question is checked and its photo decoded (`prepare`), many go through the model (`ask`).

Which vector is compared with which column, and what each choice was measured to give, stands in `ask`.
Letters: D embedding width, S side of the model's square.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eclip.dataloading.schema import Box
from eclip.inference import EncodedImages, Region, TrainedModel, describe, read_picture
from eclip.inference.encoding import IMAGE, TEXT, Instances
from eclip.inference.pictures import Pixels, widen
from eclip.inference.regions import find_regions
from eclip.inference.trained import BATCH, Vectors
from eclip.model.eclip import ImageFeatures
from eclip.search.query.query import Query

MARGIN = 0.15
"""Around a box that is asked, of its sides. On 442 photos of the demo, the true box of the product as query, mAP@10 is
82.6 without and 87.9 with it, and of another product in the photo 65.6 and 73.5."""
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
    column: str
    box: str | None
    """The column of the box that belongs to `column`."""
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

    columns: of the table. Words alone meet the titles' own feature (`text`), where it is stored, else what each image
    shows of its title (mAP@10 98.5 and 39.8 on titles of the demo that no page has). A photo, or a box of it, is its
    own prompt on both sides (62.7; 56.2 against global vectors). Words with a photo prompt it: the instance and the
    words' feature together, against the instances of titles (79.2; without the words' feature 75.0).
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
        for place, found in zip(places, _ask_photos(model, [prepared[i] for i in places], features), strict=True):
            asked[place] = found
    return [found for found in asked if found is not None]


def _ask_words(model: TrainedModel, feature: Tensor, columns: set[str]) -> Asked:
    column = next(name for name in ("text", "instance_title", "global") if name in columns)
    return Asked(_unit(feature), column, "box_title", feature)


def _ask_photos(model: TrainedModel, prepared: Sequence[Prepared], features: dict[str, Tensor]) -> list[Asked]:
    pixels = [p.photo for p in prepared if p.photo is not None]
    encoded = model.encoder.images(torch.stack([p.square for p in pixels]), [p.size for p in pixels])
    if not model.encoder.has_decoder:
        return [Asked(vector, "global", None) for vector in _numpy(encoded.vectors)]
    asked: dict[int, Asked] = {}
    alone = [i for i, p in enumerate(prepared) if p.query.words is None]
    if alone:
        part = _part(encoded, alone)
        found = model.encoder.instances(part, part.features.cls, IMAGE)
        places = _regions(model, prepared, alone, found)
        for i, vector, regions in zip(alone, _numpy(found.vectors), places, strict=True):
            asked[i] = Asked(vector, "instance_image", "box_image", regions=regions)
    named = [(i, features[p.query.words]) for i, p in enumerate(prepared) if p.query.words is not None]
    if named:
        rows, words = [i for i, _ in named], torch.stack([feature for _, feature in named])
        found = model.encoder.instances(_part(encoded, rows), words, TEXT)
        vectors = _numpy(F.normalize(found.vectors + F.normalize(words, dim=-1), dim=-1))
        places = _regions(model, prepared, rows, found)
        for (i, feature), vector, regions in zip(named, vectors, places, strict=True):
            asked[i] = Asked(vector, "instance_title", "box_title", feature, regions)
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


def _unit(feature: Tensor) -> Vectors:
    return _numpy(F.normalize(feature.float(), dim=-1))


def _numpy(tensor: Tensor) -> Vectors:
    return np.ascontiguousarray(tensor.float().cpu().numpy())
