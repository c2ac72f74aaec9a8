"""What each way to ask finds, through `Searcher`: `python -m benchmarks.search.finding --index INDEX --data SHARDS`.

Customer photos of a split and their titles ask for detail pages of the product that is meant, images unfolded: mAP@1
and @10 (evaluate/metrics.py), and the median time of a question. "main" is the photo's own product, "other" another one
that is at least half visible in it and has pages: its true box, or the title of one of its pages. Prints Markdown.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from eclip.dataloading.schema import Product
from eclip.dataloading.shards import ShardIndex
from eclip.evaluate.metrics import ranking_scores
from eclip.search.query import Filters, Query, Searcher

DEPTH = 10
PAGES = Filters(source="detail")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Ask an index of a split, which must hold it whole."""

    index: str
    data: Path
    """Folder of the shards that it was made of."""
    split: str = "test"


@dataclass(frozen=True)
class Asked:
    """A question and the product that is meant."""

    query: Query
    product: str


def questions(index: ShardIndex) -> Iterator[tuple[str, Asked]]:
    """(way to ask, question) of every customer photo."""
    products = {product.product: product for product in map(index.product, range(index.num_products))}
    for position in range(index.num_products):
        product = index.product(position)
        for place, record in enumerate(product.images):
            if record.source != "customer" or not record.instances:
                continue
            row = int(index.image_start[position]) + place
            photo, title = index.read_image(row), index.title(row)
            yield "words: the photo's title", Asked(Query(words=title), product.product)
            yield "the same, hybrid", Asked(Query(words=title, hybrid=True), product.product)
            yield "the same, --rerank 50", Asked(Query(words=title, rerank=50), product.product)
            yield "photo", Asked(Query(image=photo), product.product)
            yield "photo, words: main", Asked(Query(image=photo, words=title), product.product)
            yield "box: main", Asked(Query(image=photo, box=record.instances[0].box), product.product)
            for other in record.instances[1:]:
                if other.visible >= 0.5 and (told := _title(products, other.product)) is not None:
                    yield "photo: other", Asked(Query(image=photo), other.product)
                    yield "photo, words: other", Asked(Query(image=photo, words=told), other.product)
                    yield "box: other", Asked(Query(image=photo, box=other.box), other.product)
                    break


def _title(products: Mapping[str, Product], name: str) -> str | None:
    """Of a product's first page."""
    pages = (record for record in products[name].images if record.source == "detail") if name in products else ()
    return next((record.title or products[name].title for record in pages), None)


def main() -> None:
    arguments = tyro.cli(Arguments)
    searcher = Searcher.open(arguments.index)
    labels = searcher.table.scan(["product"], "source = 'detail'")["product"].to_pylist()
    number = {name: i for i, name in enumerate(dict.fromkeys(labels))}
    gallery = np.array([number[name] for name in labels])
    found: dict[str, list[tuple[list[int], int, float]]] = {}
    for way, asked in questions(ShardIndex.open(arguments.data, arguments.split)):
        if asked.product not in number:
            continue
        began = time.perf_counter()
        answer = searcher.search(replace(asked.query, filters=PAGES, limit=DEPTH, fold=False))
        hits = [number[hit.product] for hit in answer.hits]
        found.setdefault(way, []).append((hits, number[asked.product], time.perf_counter() - began))
    print("| asked by | questions | mAP@1 | mAP@10 | ms, median |\n|---|---|---|---|---|")
    for way, rows in found.items():
        # Ranks are products here: an image of each product stands for its label.
        first = {label: place for place, label in reversed(list(enumerate(gallery.tolist())))}
        ranked = np.array([[first[hit] for hit in hits] for hits, _, _ in rows])
        scores = ranking_scores(ranked, np.array([meant for _, meant, _ in rows]), gallery, average=True)
        middle = 1000 * float(np.median([seconds for _, _, seconds in rows]))
        print(f"| {way} | {len(rows)} | {100 * scores['mAP@1']:.1f} | {100 * scores['mAP@10']:.1f} | {middle:.0f} |")


if __name__ == "__main__":
    main()
