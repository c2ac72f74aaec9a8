"""Product retrieval by words, and by a photo with words that say which of the things in it is meant.

By words: the titles of customer photos ask, detail pages answer; which vector of a page do words find best? By photo
and words: a cluttered photo with the title of ONE product in it asks for the pages of that product. The second such
table takes the title of ANOTHER product that the photo shows: does the prompt pick the right object, or does the
photo's main product come first whatever is said? Pages are compared by their pixels, if a row does not say that their
own titles are known too.

Letters: q queries, M detail pages, D embedding width.
"""

from collections.abc import Iterator

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eclip.evaluate.evaluator import Evaluator, Outcome, Split
from eclip.evaluate.features import Features
from eclip.evaluate.metrics import (
    RANKS,
    chance_scores,
    count_positives,
    ranking_scores,
    top_matches,
)
from eclip.evaluate.report.tables import Table

Compared = dict[str, tuple[Tensor, Tensor]]
"""Row of a table -> vectors of the queries (q, D) and of the pages (M, D)."""
FIRST = "photo's own R@1"
"""Share of queries whose first page is of the photo's main product, which was not asked for."""


def run(evaluator: Evaluator, split: Split) -> Iterator[tuple[str, Outcome]]:
    """By words alone; photos with their own title; photos with the title of another product in them."""
    features = split.features
    photos, pages = features.select(features.sources == "customer"), features.select(features.sources == "detail")
    names = ("product_retrieval_words", "product_retrieval_prompted", "product_retrieval_prompted_other")
    for found, what in ((photos, "customer photos to ask with"), (pages, "detail pages to find")):
        if not len(found):
            yield from ((name, f"no {what} in this split") for name in names)
            return
    yield names[0], by_words(photos.select(distinct_titles(photos)), pages)
    yield names[1], with_own_title(photos, pages)
    yield names[2], with_another_title(photos, pages)


def distinct_titles(photos: Features) -> NDArray[np.int64]:
    """Positions of the first photo of each title: one that two products share stands for each of them."""
    pairs = np.stack([photos.titles, photos.products])
    return np.sort(np.unique(pairs, axis=1, return_index=True)[1])


def by_words(asked: Features, pages: Features) -> Table | str:
    """The titles of `asked`, whose pixels play no part, against every vector that a page has."""
    vectors: dict[str, Tensor | None] = {
        "page: instance (title)": pages.instance_text,
        "page: instance (image)": pages.instance_image,
        "page: global": pages.global_image,
        "page: instance (title) + its title": _plus(pages.instance_text, pages.text),
        "page: global + its title": _plus(pages.global_image, pages.text),
        "page: its title alone": pages.text,
    }
    compared = {name: (asked.text, vector) for name, vector in vectors.items() if vector is not None}
    return _table("product retrieval by words, titles of customer photos", compared, asked.products, pages.products)


def with_own_title(photos: Features, pages: Features) -> Table | str:
    """Customer photos, each with its own title."""
    compared = _compared(photos, photos.text, photos.instance_text, pages)
    title = "product retrieval by photo and words, the title of its main product"
    return _table(title, compared, photos.products, pages.products)


def with_another_title(photos: Features, pages: Features) -> Table | str:
    """Customer photos, each with the title of another product that it shows, whose pages are then right."""
    prompted = photos.prompted
    if prompted is None:
        return "no customer photo is known to show another product of this split"
    shown = photos.select(np.searchsorted(photos.rows, prompted.rows))
    compared = _compared(shown, prompted.text, prompted.instance, pages)
    title = "product retrieval by photo and words, the title of another product in it"
    return _table(title, compared, prompted.products, pages.products, own=shown.products)


def _compared(photos: Features, text: Tensor, instance: Tensor | None, pages: Features) -> Compared:
    """The rows for photos with words: text (q, D), and the instance embeddings (q, D) that it prompts in the photos."""
    known = _plus(pages.instance_text, pages.text)
    instance_rows = {
        "photo: instance (image)": (photos.instance_image, pages.instance_image),
        "words: instance (title)": (text if instance is not None else None, pages.instance_text),
        "both: instance (title)": (instance, pages.instance_text),
        "both: instance (title) + text": (_plus(instance, text), pages.instance_text),
    }
    rows: dict[str, tuple[Tensor | None, Tensor | None]] = {
        **instance_rows,
        "photo: global": (photos.global_image, pages.global_image),
        "words: global": (text, pages.global_image),
        "both: global + text": (_plus(photos.global_image, text), pages.global_image),
        "both: instance (title) + text, page's title known": (_plus(instance, text), known),
        "words: text, page's title known": (text, pages.text),
    }
    return {name: (query, page) for name, (query, page) in rows.items() if query is not None and page is not None}


def _plus(vector: Tensor | None, text: Tensor) -> Tensor | None:
    return None if vector is None else F.normalize(vector + text, dim=-1)


def _table(
    title: str,
    compared: Compared,
    asked: NDArray[np.int64],
    pages: NDArray[np.int64],
    own: NDArray[np.int64] | None = None,
) -> Table | str:
    """asked (q,), pages (M,): products; own (q,): the photos' main products, where another one is asked for."""
    kept = count_positives(asked, pages) > 0
    if not kept.any():
        return "no query has a match among the detail pages"
    queries = np.flatnonzero(kept)
    rows = {}
    for name, (query, page) in compared.items():
        found = top_matches(query[queries], page, max(RANKS))
        rows[name] = ranking_scores(found, asked[kept], pages, average=True)
        if own is not None:
            rows[name][FIRST] = float((pages[found[:, 0]] == own[kept]).mean())
    rows["chance"] = chance_scores(asked, pages, average=True)
    if own is not None:
        rows["chance"][FIRST] = float((count_positives(own[kept], pages) / len(pages)).mean())
    return Table(title=title, rows=rows, counts={"queries": len(queries), "gallery": len(pages)})
