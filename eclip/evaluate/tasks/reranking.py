"""Does the matching head help? The first 50 pages that a cosine finds are put in another order by the head of L_itm.

Words ask (titles of customer photos; first by the pages' instances prompted by their own titles) or photos do (first by
image-prompted instances on both sides). The head is asked about pairs of an instance and a title: for words the page's
instance with the words, for photos the photo's instance with the page's title. The instance is a stored vector, or
decoded for the question: the page prompted by the words, the photo prompted by each page's title. That is 50 decodings
a query, soon more than the rest of an evaluation, and so only done for `decode_queries` of them, evenly spread.
"+ cosine" adds the first score as a logit, exp(logit_scale) times the cosine. Chance is a random order of all pages,
and of the 50.

Letters: q queries, K = 50 candidates, M detail pages, N patch tokens, D embedding width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eclip.evaluate.evaluator import Evaluator, Outcome, Split
from eclip.evaluate.extras import MAX_PAGES, spread
from eclip.evaluate.features import Features
from eclip.evaluate.metrics import chance_scores, count_positives, ranking_scores, shuffled_scores, top_matches
from eclip.evaluate.prompting import decode_by_text, match_odds, trains_head
from eclip.evaluate.report.tables import Table
from eclip.evaluate.tasks.words_and_photo import distinct_titles

DEPTH = 50
ALIKE = "cosine, photo prompted by the title"
NAMES = ("rerank_words", "rerank_photos")
DECODED = ("rerank_words_decoded", "rerank_photos_decoded")


@dataclass(kw_only=True)
class Stage:
    """What a cosine found, best first."""

    found: NDArray[np.int64]
    """(q, K) positions among the pages."""
    cosine: Tensor
    """(q, K)."""
    labels: NDArray[np.int64]
    """(q,) products that are right."""

    @classmethod
    def of(cls, queries: Tensor, pages: Tensor, labels: NDArray[np.int64]) -> "Stage":
        """The DEPTH first of `pages` (M, D) for each of the `queries` (q, D)."""
        found = top_matches(queries, pages, DEPTH)
        cosine = [pages[places] @ query for query, places in zip(queries, found, strict=True)]
        return cls(found=found, cosine=torch.stack(cosine), labels=labels)

    def reordered(self, scores: Tensor) -> NDArray[np.int64]:
        """(q, K) by other scores (q, K); equal ones stay in the order of the cosine."""
        order = scores.argsort(dim=1, descending=True, stable=True)
        return np.take_along_axis(self.found, order.numpy(), axis=1)


def run(evaluator: Evaluator, split: Split) -> Iterator[tuple[str, Outcome]]:
    """Words and photos with stored vectors; with `decode_queries` then with decoded ones."""
    features, decoded = split.features, evaluator.decode_queries > 0
    photos, pages = features.select(features.sources == "customer"), features.select(features.sources == "detail")
    asked = photos.select(count_positives(photos.products, pages.products) > 0)
    reason = ""
    if not trains_head(evaluator.config.objective):
        reason = "this run trained no matching head"
    elif not len(asked):
        reason = "no customer photo with a detail page of its product in this split"
    if reason:
        yield from ((name, reason) for name in (NAMES + DECODED if decoded else NAMES))
        return
    titles = asked.select(distinct_titles(asked))
    yield NAMES[0], by_words(evaluator, titles, pages)
    yield NAMES[1], by_photos(evaluator, asked, pages)
    if not decoded:
        return
    few = titles.select(spread(np.arange(len(titles)), evaluator.decode_queries))
    kept = all(int(row) in features.tokens for row in pages.rows)
    yield DECODED[0], by_words(evaluator, few, pages, decode=True) if kept else _too_many(pages)
    few = asked.select(np.array([int(row) in features.tokens for row in asked.rows]))
    yield DECODED[1], by_photos(evaluator, few, pages, decode=True) if len(few) else "no photo of the sample has a page"


def _too_many(pages: Features) -> str:
    return f"{len(pages)} detail pages: patch tokens are kept of {MAX_PAGES} at most; take fewer products (--limit)"


def by_words(evaluator: Evaluator, asked: Features, pages: Features, *, decode: bool = False) -> Table:
    """The titles of `asked`; with `decode` the candidates are also prompted by them, from `pages.tokens`."""
    assert pages.instance_text is not None, "a trained head has a trained decoder"
    stage = Stage.of(asked.text, pages.instance_text, asked.products)
    stored = [
        _odds(evaluator, pages.instance_text[found], text)
        for found, text in zip(stage.found, asked.text, strict=True)
    ]  # fmt: skip
    rows = {"head, stored instance": torch.stack(stored)}
    if decode:
        prompted = [
            _odds(evaluator, _decode(evaluator, pages, found, text.expand(len(found), -1)), text)
            for found, text in zip(stage.found, asked.text, strict=True)
        ]
        rows["head, page prompted by the words"] = torch.stack(prompted)
    title = "reranking for words, stored vectors" if not decode else "reranking for words, decoded"
    return _table(evaluator, title, "instance (title)", stage, rows, pages)


def by_photos(evaluator: Evaluator, asked: Features, pages: Features, *, decode: bool = False) -> Table:
    """The photos of `asked`; with `decode` they are also prompted by the candidates' titles, from `asked.tokens`."""
    assert asked.instance_image is not None and pages.instance_image is not None, "a trained head has a decoder"
    assert pages.instance_text is not None
    stage = Stage.of(asked.instance_image, pages.instance_image, asked.products)
    stored, prompted, alike = [], [], []
    for place, found in enumerate(stage.found):
        titles = pages.text[found]
        stored.append(_odds(evaluator, asked.instance_image[place], titles))
        if decode:
            instances = _decode(evaluator, asked, np.full(len(found), place), titles)
            prompted.append(_odds(evaluator, instances, titles))
            alike.append((instances * pages.instance_text[found]).sum(-1))
    rows = {"head, photo's own instance": torch.stack(stored)}
    if decode:
        rows["head, photo prompted by the title"] = torch.stack(prompted)
        # Without the head: does what the photo holds of this title look like what the page holds of it?
        rows[ALIKE] = torch.stack(alike)
    title = "reranking for photos, stored vectors" if not decode else "reranking for photos, decoded"
    return _table(evaluator, title, "instance (image)", stage, rows, pages)


def _odds(evaluator: Evaluator, instances: Tensor, texts: Tensor) -> Tensor:
    """Of K pairs, one side of them (K, D) and the other too or (D,): (K,)."""
    return match_odds(evaluator.model, instances, texts, device=evaluator.device)


def _decode(evaluator: Evaluator, images: Features, places: NDArray[np.int64], text: Tensor) -> Tensor:
    """The images at `places` (K,), whose tokens are kept, prompted by text (K, D): (K, D) on the CPU."""
    tokens = torch.stack([images.tokens[int(row)] for row in images.rows[places]])
    return decode_by_text(evaluator.model, tokens.to(evaluator.device).float(), text.to(evaluator.device)).cpu()


def _table(
    evaluator: Evaluator, title: str, first: str, stage: Stage, scores: dict[str, Tensor], pages: Features
) -> Table:
    """scores: row -> (q, K)."""
    labels, products = stage.labels, pages.products
    scale = evaluator.model.scale().item()
    rows = {f"{first}, not reranked": ranking_scores(stage.found, labels, products, average=True)}
    for name, score in scores.items():
        both = score + (1 if name == ALIKE else scale) * stage.cosine
        rows[name] = ranking_scores(stage.reordered(score), labels, products, average=True)
        rows[f"{name} + cosine"] = ranking_scores(stage.reordered(both), labels, products, average=True)
    rows["chance, of these 50"] = shuffled_scores(stage.found, labels, products)
    rows["chance"] = chance_scores(labels, products, average=True)
    counts = {"queries": len(labels), "gallery": len(products)}
    return Table(title=title, rows=rows, counts=counts)
