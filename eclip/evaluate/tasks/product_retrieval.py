"""Product retrieval: a customer's cluttered photo finds the detail pages of what it shows; mAP and R at 1, 5, 10.

Fine: a detail page of the same product is right (Product1M's question). Coarse: any page of the same category is right
(M5Product's), the product's own pages included. Image setting: the embeddings see pixels alone, on both sides.
Image+text setting: each image comes with its own title, query and gallery alike, so that the titles alone already
find much: the "text only" row is that share.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from eclip.evaluate.evaluator import Evaluator, Outcome, Split
from eclip.evaluate.features import Features
from eclip.evaluate.metrics import chance_scores, count_positives, retrieval_scores
from eclip.evaluate.report.tables import Table


def run(evaluator: Evaluator, split: Split) -> Iterator[tuple[str, Outcome]]:
    """Fine, fine for the queries whose type training has not seen (where the catalogue knows them), coarse."""
    features, unseen = split.features, split.unseen_type()
    fine = "product retrieval, same product"
    yield "product_retrieval", product_retrieval(features, features.products, title=fine)
    if unseen.any():
        title = f"{fine}, products whose head noun was not in training"
        yield (
            "product_retrieval_unseen_type",
            product_retrieval(features, features.products, title=title, keep=unseen),
        )
    categories = split.index.category_ids[features.products]
    coarse = "product retrieval, same category"
    yield "product_retrieval_coarse", product_retrieval(features, categories, title=coarse)


def product_retrieval(
    features: Features, labels: NDArray[np.int64], *, title: str, keep: NDArray[np.bool_] | None = None
) -> Table | str:
    """Customer photos against detail pages; labels (n,) equal where the two match.

    `keep` (n,) restricts the queries, never the gallery. Returns a table, or the reason why there is none.
    """
    query = features.sources == "customer"
    gallery = features.sources == "detail"
    if keep is not None:
        query = query & keep
    for found, what in ((query, "customer photos to ask with"), (gallery, "detail pages to find")):
        if not found.any():
            return f"no {what} in this split"
    if not (answered := count_positives(labels[query], labels[gallery]) > 0).any():
        return "no query has a match among the detail pages"
    queries, pages = features.select(query).embeddings(), features.select(gallery).embeddings()
    rows = {
        name: retrieval_scores(queries[name], pages[name], labels[query], labels[gallery], average=True)
        for name in queries
    }
    rows["chance"] = chance_scores(labels[query], labels[gallery], average=True)
    counts = {"queries": int(answered.sum()), "gallery": int(gallery.sum())}
    return Table(title=title, rows=rows, counts=counts)
