"""What the samples show: sources, titles, boxes, distractors of the same split."""

import io
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from eclip.dataloading.demo.scenes import MIN_VISIBLE
from eclip.dataloading.demo.split import SPLITS
from eclip.dataloading.demo.titles import alike, names_colour
from eclip.dataloading.schema import SOURCES
from tests.dataloading.demo.packed import read


def test_products_of_the_splits_are_disjoint_even_as_distractors(shards: Path) -> None:
    shown = {
        name: {i.product for product, _ in read(shards, name) for image in product.images for i in image.instances}
        for name in SPLITS
    }
    assert not shown["train"] & shown["test"] and not shown["train"] & shown["val"] and not shown["val"] & shown["test"]


def test_samples(shards: Path) -> None:
    samples = [sample for name in SPLITS for sample in read(shards, name)]
    assert len(samples) == 24
    series_of = {product.product: product.attributes["series"] for product, _ in samples}
    kinds = {product.product: product.attributes["type"] for product, _ in samples}
    for product, images in samples:
        assert len(images) == len(product.images) == 6
        assert product.key == product.product and product.title and product.catalog.startswith("catalog-")
        assert {"colour", "colours", "category", "size", "type", "unseen_type"} <= product.attributes.keys()
        assert set(product.titles) >= {"en", "de", "ja"}
        sources = defaultdict(set)
        for record, data in zip(product.images, images, strict=True):
            with Image.open(io.BytesIO(data)) as picture:
                picture.load()
                assert picture.format == "JPEG" and picture.size == (64, 64) == (record.width, record.height)
            sources[record.sku].add(record.source)
            main, *others = record.instances
            assert (main.product, main.sku) == (product.product, record.sku) and record.sku in product.skus
            assert len({i.product for i in record.instances}) == len(record.instances)
            assert len(others) <= {"detail": 0, "customer": 6, "ad": 3}[record.source]
            for instance in record.instances:
                x0, y0, x1, y1 = instance.box
                assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
                assert MIN_VISIBLE <= instance.visible <= 1
            for other in others:  # the title fits the titled product alone
                assert series_of[other.product] != product.attributes["series"]
                if alike(kinds[other.product], kinds[product.product]):
                    assert names_colour(record.title, product.skus[record.sku]["colour"])
        assert all(len(s) >= 2 for s in sources.values()), "training pairs need two sources of one SKU"
        assert set().union(*sources.values()) <= set(SOURCES)
    trained = {product.attributes["type"] for product, _ in read(shards, "train")}
    for product, _ in samples:
        assert product.attributes["unseen_type"] == (product.attributes["type"] not in trained)


def test_box_marks_where_the_product_is(shards: Path) -> None:
    """On detail pages (one product, calm background) the box holds nearly all of the picture's contrast."""
    shares = []
    for name in SPLITS:
        for product, images in read(shards, name):
            for record, data in zip(product.images, images, strict=True):
                if record.source == "detail":
                    gray = np.asarray(Image.open(io.BytesIO(data)).convert("L"), np.float32)
                    edges = np.abs(np.diff(gray, axis=0))[:, :-1] + np.abs(np.diff(gray, axis=1))[:-1]
                    x0, y0, x1, y1 = (int(v) for v in record.instances[0].box)
                    inside = edges[max(0, y0 - 2) : y1 + 2, max(0, x0 - 2) : x1 + 2]
                    shares.append(inside.sum() / edges.sum() / (inside.size / edges.size))
    assert np.median(shares) > 2  # contrast inside is over twice that of an equal area of the whole picture
