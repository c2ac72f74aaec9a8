"""The records of a catalogue and the batch of a training step.

A sample of a shard is one product: `<key>.json` (a `Product`) and its images `<key>.000.jpg`, `<key>.001.jpg`, ...
Real catalogues may leave out what only the embedded one knows (boxes, SKUs, sources): the defaults say what is assumed.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # packing starts a process per core, and these records need no torch
    from torch import Tensor

SOURCES = ("detail", "customer", "ad")
"""Where an image comes from: the shop's detail page, a customer's photo, an advertisement's frame."""

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the stored image, half-open."""


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One product seen in an image: the box of its VISIBLE pixels and the visible share of them."""

    product: str
    sku: str
    box: Box
    visible: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One image of a product. `instances` starts with the product itself; distractors follow."""

    file: str
    source: str = "detail"
    sku: str = ""
    title: str = ""
    width: int = 0
    height: int = 0
    instances: tuple[Instance, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Product:
    """One sample of a shard: a product, its facts and its images."""

    key: str
    product: str
    title: str
    category: str
    catalog: str = ""
    titles: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    skus: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    images: tuple[ImageRecord, ...] = ()

    def to_json(self) -> bytes:
        """UTF-8 JSON, keys in declaration order."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes, *, where: str) -> "Product":
        """Parse and validate a sample's JSON; `where` names it in errors. Raises ValueError."""
        try:
            record = json.loads(data)
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}")
        for name in ("title", "product", "category"):
            if not isinstance(record.get(name), str) or not record[name].strip():
                raise ValueError(f"{where}: no {name!r}; every product needs a non-empty {name!r} string")
        images = []
        for image in record.get("images", ()):
            instances = tuple(Instance(**{**i, "box": tuple(i["box"])}) for i in image.get("instances", ()))
            images.append(ImageRecord(**{**image, "instances": instances}))
        known = {f.name for f in dataclasses.fields(cls)} - {"images"}
        fields = {k: v for k, v in record.items() if k in known}
        return cls(**{"key": record["product"], "catalog": record["product"], **fields, "images": tuple(images)})


@dataclass(kw_only=True)
class Batch:
    """B products, two images of different sources each (views a and b), and a title for each image.

    Rank r of W holds rows [r*B, (r+1)*B) of the global batch. Ragged titles: sequence s is
    tokens[cu_seqlens[s]:cu_seqlens[s+1]]; sequences 0..B-1 belong to views a, B..2B-1 to views b.
    """

    images: "Tensor | None"
    """(B, 2, 3, S, S) uint8, RGB; None when the loader runs with decoder="none" (cached features)."""
    image_rows: "Tensor"
    """(B, 2) int64: rows of the shard index, keys of the feature cache."""
    tokens: "Tensor"
    """(total,) int64 WordPiece ids."""
    cu_seqlens: "Tensor"
    """(2B+1,) int32."""
    product_ids: "Tensor"
    """(B,) int64, equal where products are equal."""
    catalog_ids: "Tensor"
    """(B,) int64."""
    category_ids: "Tensor"
    """(B,) int64, positions in the index's list of categories."""
    title_ids: "Tensor"
    """(B, 2) int64, equal where titles are equal."""
    keys: list[str]
    """2B names "product/file", views a then views b: what an error message prints."""
    step: int
    epoch: int
    corrupt: tuple[str, ...] = ()
    """Keys of images first found undecodable in this batch; another image of the product took their place."""

    def to(self, device: Any) -> "Batch":
        """The same batch with every tensor on `device`."""
        moved: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if hasattr(v, "to")}
        return dataclasses.replace(self, **moved)
