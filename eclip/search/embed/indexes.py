"""Which indexes a table has: of its vectors when there are many rows, of titles, of what filters ask for."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from eclip.search.embed.schema import vector_columns

Kind = Literal["auto", "flat", "ivf_pq"]
FLAT_ROWS = 50_000
"""Above it a search through every vector takes longer than a customer waits for (50k x 384: some 70 ms on 2 cores)."""
_PQ_ROWS = 256  # product quantisation learns 256 centres of each sub-vector
METRIC = "cosine"


@dataclass(frozen=True)
class VectorIndex:
    """How the vectors of a table are found, and what a query should ask for."""

    kind: Literal["flat", "ivf_pq", "ivf_sq"]
    partitions: int = 0
    sub_vectors: int = 0
    nprobes: int = 0
    """Partitions that a query looks into."""
    refine: int = 0
    """So many times the wanted rows are compared again by their own vectors."""

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "VectorIndex":
        """That of an index that is there."""
        return cls(**{name: value for name, value in record["index"].items() if name != "metric"})

    def facts(self) -> dict[str, Any]:
        """For the record of the index."""
        return {"metric": METRIC, **vars(self)}


def plan(rows: int, dim: int, wanted: Kind, vectors: str) -> VectorIndex:
    """The index of `rows` vectors of `dim` numbers. Raises ValueError where IVF_PQ has too few rows to learn from."""
    if wanted == "ivf_pq" and rows < _PQ_ROWS:
        raise ValueError(f"--index ivf_pq: {rows} rows, and it learns from at least {_PQ_ROWS}; use --index flat")
    # The usual square root, within what a search through the centres and the list of each takes alike.
    partitions = max(1, round(math.sqrt(rows)))
    probes = max(1, min(partitions, 20 if partitions < 512 else round(partitions / 25)))
    if wanted != "flat" and vectors == "int8" and rows >= _PQ_ROWS:
        return VectorIndex("ivf_sq", partitions, 0, probes, 4)
    if wanted == "ivf_pq" or (wanted == "auto" and rows > FLAT_ROWS):
        return VectorIndex("ivf_pq", partitions, sub_vectors(dim), probes, 20)
    return VectorIndex("flat")


def sub_vectors(dim: int) -> int:
    """A byte for every 8 numbers, or as near to that as divides."""
    return next(count for count in range(max(1, dim // 8), 0, -1) if dim % count == 0)


def wanted_indexes(index: VectorIndex, has_decoder: bool) -> dict[str, Any]:
    """Column -> LanceDB's settings of its index."""
    from lancedb.index import FTS, Bitmap, BTree, IvfPq, IvfSq, LabelList

    # Titles come in any language: words are neither stemmed nor dropped by the rules of one of them.
    text = FTS(stem=False, remove_stop_words=False, ascii_folding=True, lower_case=True)
    found: dict[str, Any] = {"title": text, "id": BTree(), "product": BTree(), "price": BTree()}
    found |= {"category": Bitmap(), "facets": LabelList()}
    for column in vector_columns(has_decoder) if index.kind != "flat" else ():
        if index.kind == "ivf_pq":
            found[column] = IvfPq(
                distance_type=METRIC, num_partitions=index.partitions, num_sub_vectors=index.sub_vectors
            )
        else:
            found[column] = IvfSq(distance_type=METRIC, num_partitions=index.partitions)
    return found


def missing(table: Any, index: VectorIndex, has_decoder: bool) -> dict[str, Any]:
    """Of the wanted indexes those that the table has not."""
    there = {column for found in table.list_indices() for column in found.columns}
    return {column: how for column, how in wanted_indexes(index, has_decoder).items() if column not in there}


def build(table: Any, index: VectorIndex, has_decoder: bool, tell: Callable[[str], None]) -> None:
    """Build what is missing, one index after the other."""
    for column, how in missing(table, index, has_decoder).items():
        began = time.monotonic()
        table.create_index(column, config=how)
        if (took := time.monotonic() - began) > 5:
            tell(f"  index of {column}: {type(how).__name__}, {took:.0f} s")
