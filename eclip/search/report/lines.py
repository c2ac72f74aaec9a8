"""An answer as a table on the terminal."""

import unicodedata
from collections.abc import Sequence

from eclip.evaluate.report.lettering import clean
from eclip.search.query import Answer, Hit

_WIDEST = {"title": 44, "category": 18, "id": 48}


def format_answer(answer: Answer) -> str:
    """A line a hit, the best first: rank, score, title, category, price where one has one, region, image."""
    if not answer.hits:
        return "no hits: nothing in the index fulfils all filters"
    priced = any(hit.price is not None for hit in answer.hits)
    head = ["", "score", "title", "category", *(["price"] if priced else []), "region", "id"]
    rows = [_cells(rank, hit, priced) for rank, hit in enumerate(answer.hits, start=1)]
    widths = [max(_width(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(_pad(cell, width, name) for cell, width, name in zip(row, widths, head, strict=True)).rstrip()
             for row in [head, *rows]]  # fmt: skip
    took = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in answer.seconds.items() if seconds >= 5e-4)
    lines += ["", f"score: {answer.scored_by}; {took}"]
    if answer.photo_regions:
        lines.append(f"taken of the photo: {_box(answer.photo_regions[0].box)} of {_size(answer.photo_size)}")
    return "\n".join(lines)


def _cells(rank: int, hit: Hit, priced: bool) -> list[str]:
    price = [] if not priced else ["" if hit.price is None else f"{hit.price:g}"]
    region = "" if hit.box is None else f"{_box(hit.box)} of {_size((hit.width, hit.height))}"
    texts = [_cut(hit.title, _WIDEST["title"]), _cut(hit.category, _WIDEST["category"])]
    return [str(rank), f"{hit.score:.3f}", *texts, *price, region, _cut(hit.id, _WIDEST["id"], keep_end=True)]


def _box(box: Sequence[float]) -> str:
    return ",".join(f"{value:.0f}" for value in box)


def _size(size: tuple[int, int] | None) -> str:
    return "" if size is None else f"{size[0]}x{size[1]}"


def _cut(text: str, width: int, *, keep_end: bool = False) -> str:
    """One line without control characters, at most `width` columns."""
    text = clean(text)
    if _width(text) <= width:
        return text
    while _width(text) >= width:
        text = text[1:] if keep_end else text[:-1]
    return f"…{text}" if keep_end else f"{text.rstrip()}…"


def _pad(cell: str, width: int, name: str) -> str:
    space = " " * (width - _width(cell))
    return space + cell if name in ("", "score", "price") else cell + space


def _width(text: str) -> int:
    """Columns of a terminal: two for wide letters, none for marks."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)
