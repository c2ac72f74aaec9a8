"""The table of an index: its columns, and the record in its metadata that says what it was made of.

    id                       text; KEY/FILE of a table, SPLIT/KEY/FILE of shards; no two are equal
    product, title, category, source      text; the product as the shop names it, the image's own title
    attributes               text; a JSON object, the SKU's values before the product's
    facets                   list of text; "name=value" of what one filters by
    price                    float64 or null
    image                    text; where it lies: a file, or TAR/MEMBER
    width, height            int32; of the upright image, pixels
    thumbnail                binary; JPEG, the whole image
    global, text             unit vectors of the image and of its title
    instance_image, instance_title        unit vectors of the product in it, asked with the image itself, with its title
    box_image, box_title     four float32: x0, y0, x1, y1 in pixels of width x height; where these instances are

Parquet files (--parquet) have the same columns: all numbers of a vector in float32, every facet.

pyarrow is imported here late: it comes with the extra "serve".
"""

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

TABLE = "images"
KEY = b"eclip"
"""Of the table's metadata: a JSON object."""
FORMAT = 1
GLOBAL, INSTANCE_IMAGE, INSTANCE_TITLE = "global", "instance_image", "instance_title"
TITLE = "text"
"""The embedding of the title: what words are compared with, where catalogues have good titles."""


def need(*modules: str) -> None:
    """Raise ValueError, one line, where a package of the extra is missing."""
    import importlib

    os.environ.setdefault("LANCEDB_LOG", "error")  # LanceDB's warnings are of no use to whoever embeds or searches
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f'{module} is not installed ({error}); pip install -e ".[serve]"') from error


def vector_columns(has_decoder: bool) -> tuple[str, ...]:
    """The columns of embeddings."""
    return (GLOBAL, TITLE, INSTANCE_IMAGE, INSTANCE_TITLE) if has_decoder else (GLOBAL, TITLE)


def box_columns(has_decoder: bool) -> tuple[str, ...]:
    """The columns of boxes: without a decoder there is the title's alone, of the cosine map."""
    return ("box_image", "box_title") if has_decoder else ("box_title",)


def table_schema(
    dim: int, *, has_decoder: bool, vectors: str = "float32", metadata: Mapping[bytes, bytes] | None = None
) -> "pa.Schema":
    """The columns. dim: numbers of a vector as stored."""
    import pyarrow as pa

    number = pa.float32() if vectors == "float32" else pa.float16()
    text = [(name, pa.string()) for name in ("id", "product", "title", "category", "source", "attributes")]
    return pa.schema(
        [
            *text,
            ("facets", pa.list_(pa.string())),
            ("price", pa.float64()),
            ("image", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("thumbnail", pa.binary()),
            *((name, pa.list_(number, dim)) for name in vector_columns(has_decoder)),
            *((name, pa.list_(pa.float32(), 4)) for name in box_columns(has_decoder)),
        ],
        metadata=dict(metadata or {}),
    )


def record_of(schema: "pa.Schema") -> dict[str, Any] | None:
    """The record in a table's metadata; None for a table that is none of ours."""
    data = (schema.metadata or {}).get(KEY)
    if data is None:
        return None
    try:
        record = json.loads(data)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
