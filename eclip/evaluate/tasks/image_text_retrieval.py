"""Image-text retrieval in both directions, R@1/5/10.

The gallery of texts holds every different title once. Two readings of "right": the image's own title (the usual one,
strict: titles of one product that differ in a field count as wrong), and any title of the same product.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from eclip.evaluate.evaluator import Evaluator, Outcome, Split
from eclip.evaluate.features import Features
from eclip.evaluate.metrics import chance_scores, retrieval_scores
from eclip.evaluate.report.tables import Table


def run(evaluator: Evaluator, split: Split) -> Iterator[tuple[str, Outcome]]:
    """Tables "image_text_retrieval" (own title) and "image_text_retrieval_product" (any title of the product).

    The global row compares the two encoders alone, as in the paper; the instance row puts the image-prompted instance
    embedding in the place of the global image feature. Chance is the exact expectation of a random order.
    """
    features = split.features
    own = np.unique(features.titles, return_index=True)[1]
    # One title of two products ("Chair") stands for each of them.
    pairs = np.unique(np.stack([features.titles, features.products]), axis=1, return_index=True)[1]
    title = "image-text retrieval, own title"
    yield "image_text_retrieval", _both_ways(features, own, features.titles, title)
    title = "image-text retrieval, any title of the product"
    yield "image_text_retrieval_product", _both_ways(features, pairs, features.products, title)


def _both_ways(features: Features, texts: NDArray[np.int64], labels: NDArray[np.int64], title: str) -> Table:
    """texts: images whose titles form the text side; labels (n,): equal where image and title match."""
    text = features.text[texts]
    rows = {}
    for name, image in features.image_embeddings().items():
        there = retrieval_scores(image, text, labels, labels[texts], average=False)
        back = retrieval_scores(text, image, labels[texts], labels, average=False)
        rows[name] = _merge(there, back)
    rows["chance"] = _merge(
        chance_scores(labels, labels[texts], average=False), chance_scores(labels[texts], labels, average=False)
    )
    return Table(title=title, rows=rows, counts={"images": len(labels), "texts": len(texts)})


def _merge(there: dict[str, float], back: dict[str, float]) -> dict[str, float]:
    return {f"i2t {k}": v for k, v in there.items()} | {f"t2i {k}": v for k, v in back.items()}
