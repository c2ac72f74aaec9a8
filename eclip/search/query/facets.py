"""What can be filtered by: categories, attributes with their values, the range of prices, each with its products."""

import math
from typing import Any

from eclip.search.query.table import ImageTable

_VALUES = 50
"""Of an attribute, those that most products have."""


def read_facets(table: ImageTable) -> dict[str, Any]:
    """{"rows", "products", "categories": [{"name", "count"}], "sources": alike, "attributes": {name: [{"value",
    "count"}]}, "price": {"min", "max"} or None}; a count is of products, the most frequent first, of an attribute at
    most 50 values.

    Reads five columns of the whole table.
    """
    import pyarrow.compute as pc

    found = table.scan(["product", "category", "source", "facets", "price"])
    price = pc.min_max(found["price"]).as_py()
    attributes: dict[str, list[dict[str, Any]]] = {}
    flat = found["facets"].combine_chunks()
    for facet, count in _count(pc.list_flatten(flat), found["product"].take(pc.list_parent_indices(flat))):
        name, _, value = facet.partition("=")
        if len(values := attributes.setdefault(name, [])) < _VALUES:
            values.append({"value": value, "count": count})
    return {
        "rows": len(found),
        "products": len(pc.unique(found["product"])),
        "categories": _named(found["category"], found["product"]),
        "sources": _named(found["source"], found["product"]),
        "attributes": dict(sorted(attributes.items())),
        "price": price if price["min"] is not None and math.isfinite(price["min"]) else None,
    }


def _named(names: Any, products: Any) -> list[dict[str, Any]]:
    return [{"name": name, "count": count} for name, count in _count(names, products)]


def _count(names: Any, products: Any) -> list[tuple[str, int]]:
    """The products of each name, the most frequent first; names and products: pyarrow arrays of one length."""
    import pyarrow as pa

    pairs = pa.table({"name": names, "product": products}).group_by(["name", "product"]).aggregate([])
    counts = pairs.group_by("name").aggregate([("product", "count")]).to_pydict()
    told = [(n, c) for n, c in zip(counts["name"], counts["product_count"], strict=True) if n]
    return sorted(told, key=lambda pair: (-pair[1], pair[0]))
