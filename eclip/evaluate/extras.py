"""What is wanted of some images beyond their own embeddings, chosen before the one pass over all of them.

Photos that show other products are prompted by the title of one of these too; and the projected patch tokens of a few
images are kept for the tasks that decode them by prompts which only a ranking tells (tasks/reranking.py).

Letters: D embedding width, N patch tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from eclip.dataloading.schema import SOURCES, ImageRecord, Product
from eclip.dataloading.shards import ShardIndex

MAX_PAGES = 1024
"""Detail pages whose tokens are kept at most: 0.3 GB at D=768, N=196."""


@dataclass(frozen=True)
class Extras:
    """What the pass over the images gives beside embeddings; by default nothing."""

    prompts: Mapping[int, int] = field(default_factory=dict)
    """Row of an image -> row of the image whose title prompts it, both among the rows of the pass."""
    tokens: frozenset[int] = frozenset()
    """Rows of the images whose patch tokens are kept."""


NOTHING = Extras()


def choose_extras(
    index: ShardIndex, rows: NDArray[np.int64], facts: Mapping[int, Product], *, sample: int = 0
) -> Extras:
    """Of `rows` (ascending) and the products at their positions in the index, `facts`.

    prompts: each customer photo of more than one product is prompted by the title that a customer photo of one of the
    others has (of the same SKU where there is one; else any image's title). Both are drawn, by the row.
    tokens: those of `sample` customer photos, evenly spread, and, if there is a sample, of the detail pages if they are
    few.
    """
    source = np.array(SOURCES)[index.image_source[rows]]
    photos, pages = rows[source == "customer"], rows[source == "detail"]
    kept = frozenset[int]()
    if sample:
        kept = frozenset(map(int, [*spread(photos, sample), *(pages if len(pages) <= MAX_PAGES else [])]))
    return Extras(_other_prompts(index, rows, photos, facts), kept)


def spread(values: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """`count` of the values, evenly spread; all of them where there are no more."""
    if len(values) <= count:
        return values
    return values[np.linspace(0, len(values) - 1, count).round().astype(np.int64)]


def image_record(index: ShardIndex, product: Product, position: int, row: int) -> ImageRecord:
    """What is known of an image of the product at `position`; images without a record come last in their product."""
    place = row - int(index.image_start[position])
    return product.images[place] if place < len(product.images) else ImageRecord(file=index.image_key(row))


def _other_prompts(
    index: ShardIndex, rows: NDArray[np.int64], photos: NDArray[np.int64], facts: Mapping[int, Product]
) -> dict[int, int]:
    position_of = {product.product: position for position, product in facts.items()}
    of_rows = product_positions(index, rows)
    prompts = {}
    for row, position in zip(map(int, photos), map(int, product_positions(index, photos)), strict=True):
        shown = image_record(index, facts[position], position, row).instances[1:]
        others = [(position_of[i.product], i.sku) for i in shown if i.product in position_of]
        others = [(other, sku) for other, sku in others if other != position]
        if not others:
            continue
        rng = np.random.default_rng([20232, row])
        other, sku = others[rng.integers(len(others))]
        asked = [int(r) for r in rows[of_rows == other]]
        records = {r: image_record(index, facts[other], other, r) for r in asked}
        best = [r for r in asked if records[r].source == "customer"]
        same = [r for r in best if records[r].sku == sku]
        choice = same or best or asked
        prompts[row] = choice[rng.integers(len(choice))]
    return prompts


def product_positions(index: ShardIndex, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions in the index of the products that images belong to."""
    return np.searchsorted(index.image_start, rows, side="right") - 1
