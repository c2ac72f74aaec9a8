"""The embedded catalogue's products: one archive of rendered views and the facts of every product, read once a process.

The archive holds views (cropped RGBA WebP, at most 192 px) and products.jsonl, a line a SKU.
"""

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

from .colours import SEEN, colour_share

ARCHIVE = Path(__file__).parent / "catalog" / "cc0_products.tar"
_MIN_ASPECT = 0.2
_FROM_BEHIND = (1, 5, 9)  # positions of the rear views of every SKU: nobody shows the back of a cabinet


@dataclass(frozen=True, kw_only=True)
class CatalogSku:
    """One colour variant of a product. `views` are names of RGBA images, `size_cm` is width, depth, height."""

    sku: str
    colour: str
    recoloured: bool
    size_cm: tuple[float, float, float]
    views: tuple[str, ...]
    colour_seen: bool = True
    """False when the colour is of a part too small to call the product by it: titles then leave it out."""


@dataclass(frozen=True, kw_only=True)
class CatalogProduct:
    """One 3D model of the embedded catalogue with its colour variants, the original first."""

    product: str
    name: str
    names: Mapping[str, str]
    category: str
    tags: tuple[str, ...]
    creator: str
    skus: tuple[CatalogSku, ...]


@cache
def _archive() -> dict[str, bytes]:
    with tarfile.open(ARCHIVE) as tar:
        return {m.name: stream.read() for m in tar if m.isfile() and (stream := tar.extractfile(m)) is not None}


@cache
def load_view(name: str) -> Image.Image:
    """A view by its name in the archive, RGBA."""
    return Image.open(io.BytesIO(_archive()[name])).convert("RGBA")


@cache
def read_catalog() -> tuple[CatalogProduct, ...]:
    """The products of the archive in its order, SKUs grouped, the original colour first."""
    products: dict[str, CatalogProduct] = {}
    for line in _archive()["products.jsonl"].decode().splitlines():
        row = json.loads(line)
        width, depth, height = row["size_cm"]
        seen = colour_share([load_view(name) for name in row["views"][:5:2]], row["colour"])
        sku = CatalogSku(
            sku=row["sku"],
            colour=row["colour"],
            recoloured=row["recoloured"],
            size_cm=(width, depth, height),
            views=tuple(row["views"]),
            colour_seen=seen >= SEEN,
        )
        known = products.get(row["product"])
        products[row["product"]] = CatalogProduct(
            product=row["product"],
            name=row["name"],
            names=row["names"],
            category=row["category"],
            tags=tuple(row["tags"]),
            creator=row["creator"],
            skus=(*known.skus, sku) if known else (sku,),
        )
    return tuple(products.values())


def clear_views(sku: CatalogSku) -> list[str]:
    """Views neither from behind nor edge-on (a ruler from its end); the three widest when all are narrow."""
    views = [name for position, name in enumerate(sku.views) if position not in _FROM_BEHIND]
    aspect = {name: min(load_view(name).size) / max(load_view(name).size) for name in views}
    clear = [name for name in views if aspect[name] >= _MIN_ASPECT]
    return clear if len(clear) >= 3 else sorted(views, key=lambda name: -aspect[name])[:3]
