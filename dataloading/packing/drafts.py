"""From the rows of a table to products, and from a product and its encoded images to a sample of a shard."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import Rejection
from ..schema import ImageRecord, Product
from ..tables import Row
from .image_folder import Encoded
from .shard_writer import KEY, Sample, image_name


@dataclass
class Draft:
    """A product gathered from its rows; images are (path, sku, source, title)."""

    product: Product
    images: dict[tuple[str, str, str, str], None] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        """Of its images, as the table has them."""
        return [path for path, *_ in self.images]


def _key(product: str) -> str:
    """The product's id where it can be a key, else its readable part and a hash."""
    if KEY.fullmatch(product):
        return product
    digest = hashlib.blake2b(product.encode(), digest_size=6).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', product)[:60]}-{digest}"


def gather(rows: Iterable[Row], table: str, rejected: list[Rejection]) -> list[Draft]:
    """The products of a table in the order of their first rows, which give their facts.

    table: its name, for what is added to `rejected`: rows that say another category than the first, or nothing new.
    """
    drafts: dict[str, Draft] = {}

    def reject(row: Row, reason: str, detail: str) -> None:
        rejected.append(Rejection(kind="row", where=f"{table}, row {row.number}", reason=reason, detail=detail))

    for row in rows:
        draft = drafts.get(row.product)
        if draft is None:
            product = Product(
                key=_key(row.product),
                product=row.product,
                title=row.title,
                category=row.category,
                catalog=row.catalog,
                titles=row.titles,
                attributes=row.attributes,
            )
            draft = drafts[row.product] = Draft(product)
        elif draft.product.category != row.category:
            reason = "category differs from that of the product's first row"
            reject(row, reason, f"{row.category!r} instead of {draft.product.category!r}")
            continue
        before = len(draft.images)
        draft.images.update(((path, row.sku, row.source, row.title), None) for path in row.images)
        if len(draft.images) == before:
            reject(row, "repeats images of the product's earlier rows, with the same facts", row.images[0])
    return list(drafts.values())


def to_sample(draft: Draft, encoded: Iterable[Encoded | Rejection], rejected: list[Rejection]) -> Sample | None:
    """The product with those of its images that could be encoded, or None without any; the rest goes to `rejected`."""
    records: list[ImageRecord] = []
    data: list[bytes] = []
    for (_, sku, source, title), image in zip(draft.images, encoded, strict=True):
        if isinstance(image, Rejection):
            rejected.append(image)
            continue
        file = image_name(len(records))
        records.append(ImageRecord(file=file, source=source, sku=sku, title=title, width=image[1], height=image[2]))
        data.append(image[0])
    if not records:
        where = draft.product.product
        rejected.append(Rejection(kind="product", where=where, reason="product without a usable image"))
        return None
    skus: dict[str, dict[str, Any]] = {r.sku: {} for r in records}
    return replace(draft.product, images=tuple(records), skus=skus), data
