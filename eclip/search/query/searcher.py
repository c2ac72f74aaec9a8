"""`Searcher`: an index and the model that made it, asked.

The map of a call: `prepare` checks a question and decodes its photo; `asking.ask` makes vectors of many at once;
`_rank` asks the table for more and more rows until enough products are among them (`fusion.fold`), fuses them with
full text (`fusion.fuse`) and puts them in order with the matching head (`matching.match_scores`); `_hits` reads the
rows that are shown.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from eclip.dataloading.schema import Box
from eclip.inference import Picture, Region, TrainedModel, load
from eclip.inference.pictures import Pixels
from eclip.search.query.asking import Asked, Prepared, ask, decode
from eclip.search.query.facets import read_facets
from eclip.search.query.filters import check_names, predicate
from eclip.search.query.fusion import Candidate, fold, fuse
from eclip.search.query.matching import MATCHED, find_words, locate_in, match_scores
from eclip.search.query.query import Answer, Hit, Query
from eclip.search.query.table import ImageTable, UnreadableIndex, no_decoder

T = TypeVar("T")
_FUSED = 50
"""Hits of each ranking that are fused, at least: a hit beyond them adds less than 1 / 110."""


class Searcher:
    """An index and its model. Threads may share it: nothing in it changes."""

    def __init__(self, table: ImageTable, model: TrainedModel) -> None:
        """Use `Searcher.open`. Raises ValueError for a model that did not make the table's vectors."""
        self.table, self.model = table, model
        table.check_model(model)

    @classmethod
    def open(cls, index: str | Path, model: str | Path | None = None, device: str = "auto") -> "Searcher":
        """An index, and its model from the place that the index names, or from `model`.

        Raises ValueError, in one line, when there is no index, a damaged or an empty one, no model, or another model
        than the one that made the index.
        """
        table = ImageTable.open(index)
        place = Path(table.facts.model if model is None else model)
        if model is None and not place.is_dir():
            raise ValueError(f"{place}: no such folder, where {index} has its model; say where it is with --model")
        return cls(table, load(place, device))

    def search(self, query: "Query | Prepared") -> Answer:
        """See `Query`, `Answer`. Raises ValueError for what cannot be answered, in one line."""
        return self.search_many([query])[0]

    def search_many(self, queries: Sequence["Query | Prepared"]) -> list[Answer]:
        """Each question's answer; the model takes all words in one pass, and all photos.

        Raises ValueError for the first that cannot be answered; give `prepare`d ones where one must not end the others.
        """
        prepared = [query if isinstance(query, Prepared) else self.prepare(query) for query in queries]
        began = time.perf_counter()
        asked = ask(self.model, prepared, self.table.columns)
        took = time.perf_counter() - began
        return [self._current(partial(self._answer, p, a, took)) for p, a in zip(prepared, asked, strict=True)]

    def prepare(self, query: Query, photo: Pixels | None = None) -> Prepared:
        """Check a question against this index and decode its photo: what can fail, fails here, with ValueError.

        photo: where it was decoded already, by `read_picture` of the question's image and box with asking.MARGIN.
        """
        began = time.perf_counter()
        if query.image is not None and query.words is not None and not self.model.encoder.has_decoder:
            raise ValueError(no_decoder("words and a photo together: ask by one of the two"))
        if query.rerank:
            self.table.require_whole(MATCHED, "rerank")
        if query.hybrid:
            self.table.require_full_text()
        self._current(lambda: check_names(query.filters, self.table.count, self.facets))
        if photo is None:
            photo = decode(query, self.model.encoder.image_size)
        return Prepared(query, photo, time.perf_counter() - began)

    def facets(self) -> dict[str, Any]:
        """What can be filtered by: see `facets.read_facets`; read once."""
        return self._current(lambda: self._facets)

    def thumbnail(self, image_id: str) -> bytes:
        """JPEG. Raises NoSuchImage."""
        return bytes(self.row(image_id, ["thumbnail"])["thumbnail"])

    def row(self, image_id: str, columns: Sequence[str]) -> dict[str, Any]:
        """Some columns of an image's row. Raises NoSuchImage."""
        return self._current(lambda: self.table.find(image_id, columns))

    def locate(
        self, image_id: str, prompt: str | Picture, *, box: Box | None = None, limit: int = 5
    ) -> list[Region]:
        """Where in an image of the index is what a text or an exemplar image (a box of it) shows, in its pixels.

        It looks at the thumbnail. Raises NoSuchImage, and ValueError for an empty text or an exemplar that is no image.
        """
        row = self.row(image_id, ["thumbnail", "width", "height"])
        return locate_in(self.model, row, prompt, box=box, limit=limit)

    @cached_property
    def _facets(self) -> dict[str, Any]:
        return read_facets(self.table)

    def _current(self, work: Callable[[], T]) -> T:
        """Once more with the index that is there now, where `eclip embed` replaced the one that was opened."""
        try:
            return work()
        except UnreadableIndex as before:
            try:
                table = ImageTable.open(self.table.index)
                table.check_model(self.model)
            except ValueError as error:
                raise UnreadableIndex(f"{before}; opened anew: {error}") from error
            self.table = table
            self.__dict__.pop("_facets", None)
            return work()

    def _answer(self, prepared: Prepared, asked: Asked, model_seconds: float) -> Answer:
        query = prepared.query
        clock = _Clock({"prepare": prepared.seconds, "model": model_seconds})
        ranked = clock.time("index", lambda: self._rank(query, asked))
        scored_by = "reciprocal rank fusion" if query.hybrid else "cosine"
        if query.rerank:
            ranked = clock.time("rerank", lambda: self._rerank(ranked, asked))
            scored_by = "cosine and matching head"
        shown = ranked[: query.limit]
        rows = clock.time("rows", lambda: self.table.rows([c.row for c in shown], thumbnails=bool(query.locate)))
        boxes = [_box(row.get(asked.box)) if asked.box else None for row in rows]
        if query.locate and rows:
            assert asked.words is not None
            words = asked.words
            boxes = list(clock.time("locate", lambda: find_words(self.model, words, rows)))
        return Answer(
            hits=[_hit(row, candidate.score, box) for row, candidate, box in zip(rows, shown, boxes, strict=True)],
            scored_by=scored_by,
            photo_size=None if prepared.photo is None else prepared.photo.size,
            photo_regions=asked.regions,
            seconds=clock.seconds,
        )

    def _rank(self, query: Query, asked: Asked) -> list[Candidate]:
        """The hits before the matching head, max(limit, rerank) of them where there are as many."""
        where, wanted = predicate(query.filters), max(query.limit, query.rerank)
        depth = max(wanted, _FUSED) if query.hybrid else wanted
        vector = self.table.fit(asked.vector)
        ranked = self._enough(lambda k: self.table.nearest_sum(vector, asked.columns, k, where), depth, query.fold)
        if query.hybrid:
            words = query.words
            assert words is not None
            titles = self._enough(lambda k: self.table.full_text(words, k, where), depth, query.fold)
            ranked = fuse(ranked, titles, by_product=query.fold)
        return ranked[:wanted]

    def _enough(self, find: Callable[[int], list[Candidate]], wanted: int, folded: bool) -> list[Candidate]:
        """Ask for more rows until `wanted` hits are among them, or no row is left."""
        facts = self.table.facts
        count = wanted * math.ceil(facts.rows / max(facts.products, 1)) if folded else wanted
        while True:
            found = find(min(count, facts.rows))
            hits = fold(found) if folded else found
            if len(hits) >= wanted or len(found) < count or count >= facts.rows:
                return hits[:wanted]
            count *= 4

    def _rerank(self, ranked: list[Candidate], asked: Asked) -> list[Candidate]:
        if not ranked:
            return ranked
        assert asked.words is not None
        rows = [candidate.row for candidate in ranked]
        cosines = self.table.cosines(asked.vector, asked.columns, rows)
        scores = match_scores(self.model, asked.words, self.table.vectors([MATCHED], rows)[MATCHED], cosines)
        order = np.argsort(-scores, kind="stable")
        return [Candidate(ranked[i].row, ranked[i].product, float(scores[i])) for i in order]


class _Clock:
    """Seconds by name."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[name] = time.perf_counter() - began


def _hit(row: dict[str, Any], score: float, box: Box | None) -> Hit:
    told = {name: row[name] for name in ("id", "product", "title", "category", "image", "source", "width", "height")}
    attributes = json.loads(row["attributes"] or "{}")
    return Hit(**told, attributes=attributes, price=row["price"], score=score, box=box)


def _box(numbers: Sequence[float] | None) -> Box | None:
    if numbers is None or not all(map(math.isfinite, numbers)):
        return None
    x0, y0, x1, y1 = map(float, numbers)
    return x0, y0, x1, y1
