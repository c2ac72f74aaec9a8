"""`python -m eclip.search.check --index INDEX`: does the index find what evaluation finds?

Customer photos ask for detail pages of their products, as `eclip evaluate` has it, by the vectors that the index holds.
Beside the numbers of RUN/evaluation.json stand those of the index; every ranking is compared with an exact one of the
same vectors, and of an IVF index it is told how many of the true ten nearest are found.

Letters: Q queries, D width of the stored vectors.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from eclip.dataloading.system.console import say
from eclip.evaluate.metrics import RANKS, count_positives, ranking_scores, top_matches
from eclip.evaluate.report.tables import Table, format_table
from eclip.presets import one_line_errors
from eclip.search.embed.finish import matrix
from eclip.search.embed.schema import GLOBAL, INSTANCE_IMAGE, INSTANCE_TITLE
from eclip.search.query.filters import quoted
from eclip.search.query.table import ImageTable

ROWS = {INSTANCE_IMAGE: "instance (image)", GLOBAL: "global (image)", INSTANCE_TITLE: "instance (image+text)"}
"""Column -> the row of evaluation's table that has the same vectors on both sides."""
_TOP = max(RANKS)
_EQUAL = 1e-5
"""Scores as near as this are equal: float32, summed in another order."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Ask an index with the customer photos in it for their detail pages; compare with the run's evaluation."""

    index: str
    """A folder, or an address that LanceDB knows."""
    checkpoint: Path | None = None
    """The run whose evaluation.json is compared; by default the model that the index names."""
    split: str | None = None
    """Only images of this split of the shards; by default the one of evaluation.json."""
    queries: int | None = None
    """Ask with so many photos only, evenly spread."""


@dataclass(frozen=True)
class Checked:
    """One column of vectors."""

    scores: dict[str, float]
    """mAP@k and R@k of the index."""
    same: int
    """Queries whose ranks are those of the exact ranking, but for equal scores."""
    recall: float
    """Share of the exact ten nearest that the index finds."""


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m eclip.search.check") -> None:
    """Print the table; exits with 1 where a flat index ranks otherwise than an exact search."""
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog=prog, args=argv)
        if arguments.queries is not None and arguments.queries < 1:
            raise ValueError(f"--queries {arguments.queries}: ask with at least one photo")
    try:
        table = ImageTable.open(arguments.index)
        evaluation = read_evaluation(arguments.checkpoint or Path(table.facts.model))
        if evaluation is None and arguments.checkpoint is not None:
            raise ValueError(f"{arguments.checkpoint}: no evaluation.json there; eclip evaluate writes it")
        split = arguments.split or (evaluation or {}).get("split")
        found = check(table, split, arguments.queries)
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    for line in describe(table, found, evaluation):
        say(line)
    if table.facts.index.kind == "flat" and any(c.same < queries for c, queries, _ in found.values()):
        sys.exit("error: a flat index ranks otherwise than an exact search of its own vectors")


def read_evaluation(run_dir: Path) -> dict[str, Any] | None:
    """What evaluation wrote of a run, if it did."""
    try:
        told = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None


def check(table: ImageTable, split: str | None, limit: int | None = None) -> dict[str, tuple[Checked, int, int]]:
    """Each column of ROWS that the table has: what was found, the number of queries, and that of the gallery.

    Raises ValueError without customer photos or detail pages of the same products.
    """
    among = "" if split is None else f" AND starts_with(id, {quoted(split + '/')})"
    photos, pages = f"source = 'customer'{among}", f"source = 'detail'{among}"
    columns = [column for column in ROWS if column in table.columns]
    asking, gallery = table.scan(["product", *columns], photos), table.scan(["product", *columns], pages)
    for what, rows in (("customer photos to ask with", asking), ("detail pages to find", gallery)):
        if not len(rows):
            raise ValueError(f"{table.index}: no {what}" + ("" if split is None else f" in the split {split}"))
    names = {name: i for i, name in enumerate(dict.fromkeys(gallery["product"].to_pylist()))}
    labels = np.array([names[name] for name in gallery["product"].to_pylist()], dtype=np.int64)
    asked = np.array([names.get(name, -1) for name in asking["product"].to_pylist()], dtype=np.int64)
    kept = np.flatnonzero(count_positives(asked, labels))
    if not len(kept):
        raise ValueError(f"{table.index}: no customer photo has a detail page of its product in the index")
    if limit is not None and limit < len(kept):
        kept = kept[np.linspace(0, len(kept) - 1, limit).round().astype(int)]
    place = {row: i for i, row in enumerate(gallery["_rowid"].to_pylist())}
    found = {}
    for column in columns:
        queries, vectors = matrix(asking[column])[kept], matrix(gallery[column]).copy()
        checked = _check(table, column, pages, queries, vectors, asked[kept], labels, place)
        found[column] = (checked, len(kept), len(gallery))
    return found


def _check(
    table: ImageTable,
    column: str,
    where: str,
    queries: NDArray[np.float32],
    vectors: NDArray[np.float32],
    asked: NDArray[np.int64],
    labels: NDArray[np.int64],
    place: dict[int, int],
) -> Checked:
    exact = top_matches(torch.from_numpy(queries), torch.from_numpy(vectors), _TOP)
    ranked = np.array([[place[c.row] for c in table.nearest(query, column, _TOP, where)] for query in queries])
    near = np.abs(_scores(queries, vectors, ranked) - _scores(queries, vectors, exact)) <= _EQUAL
    both = [len(set(a) & set(b)) / len(b) for a, b in zip(ranked.tolist(), exact.tolist(), strict=True)]
    scores = ranking_scores(ranked, asked, labels, average=True)
    return Checked(scores, int(near.all(1).sum()), float(np.mean(both)))


def _scores(
    queries: NDArray[np.float32], vectors: NDArray[np.float32], ranked: NDArray[np.int64]
) -> NDArray[np.float64]:
    return np.asarray(np.einsum("qd,qkd->qk", queries, vectors[ranked], dtype=np.float64))


def describe(
    table: ImageTable, found: dict[str, tuple[Checked, int, int]], evaluation: dict[str, Any] | None
) -> Iterator[str]:
    """The table and a line a column."""
    told = (evaluation or {}).get("tables", {}).get("product_retrieval", {}).get("rows", {})
    rows: dict[str, dict[str, float]] = {}
    for column, (checked, _, _) in found.items():
        name = ROWS[column]
        if name in told:
            rows[f"{name}, evaluation"] = told[name]
        rows[f"{name}, index"] = checked.scores
    _, queries, gallery = next(iter(found.values()))
    counts = {"queries": queries, "gallery": gallery}
    yield format_table(Table(title=f"{table.index}: customer photos find detail pages", rows=rows, counts=counts))
    yield ""
    kind = table.facts.index.kind
    for column, (checked, asked, _) in found.items():
        same = f"{checked.same} of {asked} queries ranked as by an exact search of the same vectors"
        yield f"{column}: {kind}, {same}; recall@{_TOP} {100 * checked.recall:.1f}%"


if __name__ == "__main__":
    main()
