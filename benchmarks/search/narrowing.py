"""What narrower vectors lose: `python -m benchmarks.search.narrowing --index INDEX`, of an index with full vectors.

Customer photos against detail pages, as evaluation's product retrieval: mAP@1 and @10 of every number of dimensions, by
a plain cut and by the rotation that `eclip embed --dim` learns (from the detail pages alone: the photos that ask are
not known to a shop). Then what `--vectors` keeps, searched by LanceDB: int8 is an index of one byte a number, without
and with a second look at the float16 vectors (refine). Prints Markdown.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eclip.evaluate.metrics import average_precision, count_positives, retrieval_scores
from eclip.search.embed.finish import matrix
from eclip.search.embed.indexes import METRIC, plan
from eclip.search.embed.narrowing import Narrowing, rotation_of, second_moment
from eclip.search.embed.store import Place, connect

Vectors = NDArray[np.float32]


class Retrieval:
    """Customer photos, detail pages, and which belong together, of one column of vectors."""

    def __init__(self, table: Any, column: str) -> None:
        rows = table.to_arrow().select(["product", "source", column])
        sources = np.array(rows["source"].to_pylist())
        _, labels = np.unique(rows["product"].to_pylist(), return_inverse=True)
        vectors = matrix(rows[column])
        asks, pages = sources == "customer", sources == "detail"
        self.queries, self.pages = vectors[asks], vectors[pages]
        self.query_labels, self.page_labels = labels[asks], labels[pages]

    def scores(self, narrow: Callable[[Vectors], Vectors]) -> tuple[float, float]:
        """mAP@1 and mAP@10."""
        found = retrieval_scores(
            torch.from_numpy(narrow(self.queries)),
            torch.from_numpy(narrow(self.pages)),
            self.query_labels,
            self.page_labels,
            average=True,
        )
        return found["mAP@1"], found["mAP@10"]

    def by_lance(self, kind: str, refine: int | None) -> tuple[float, float]:
        """The same through LanceDB, pages in float16 and, for int8, the index of a byte a number."""
        import pyarrow as pa
        from lancedb.index import IvfSq

        number = pa.float32() if kind == "float32" else pa.float16()
        flat = pa.array(self.pages.reshape(-1).astype(number.to_pandas_dtype()))
        column = pa.FixedSizeListArray.from_arrays(flat, self.pages.shape[1])
        numbers = pa.array(np.arange(len(self.pages)))
        with tempfile.TemporaryDirectory() as folder:
            table = connect(folder).create_table("pages", data=pa.table({"number": numbers, "v": column}))
            index = plan(len(self.pages), self.pages.shape[1], "auto", kind)
            if index.kind == "ivf_sq":
                table.create_index("v", config=IvfSq(distance_type=METRIC, num_partitions=index.partitions))
            found = []
            for query in self.queries:
                asked = table.search(query, vector_column_name="v").distance_type(METRIC).limit(10)
                asked = asked.nprobes(index.partitions) if index.partitions else asked
                asked = asked.refine_factor(refine) if refine else asked
                found.append(asked.to_arrow()["number"].to_pylist())
        hits = self.page_labels[np.array(found)] == self.query_labels[:, None]
        positives = count_positives(self.query_labels, self.page_labels)
        means = [float(average_precision(hits, positives, k)[positives > 0].mean()) for k in (1, 10)]
        return means[0], means[1]


def table_of_dims(retrieval: Retrieval, dims: list[int]) -> Iterator[str]:
    """Lines of Markdown."""
    width = retrieval.pages.shape[1]
    moment = second_moment([retrieval.pages])
    yield "| numbers | cut: mAP@1 / @10 | rotation: mAP@1 / @10 |"
    yield "|---|---|---|"
    for dim in [width, *dims]:
        ways = (Narrowing(dim), Narrowing(dim, rotation_of(moment, dim)))
        yield f"| {dim} | {' | '.join(_percent(retrieval.scores(way)) for way in ways)} |"


def table_of_kinds(retrieval: Retrieval) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| kept as | mAP@1 / @10 |"
    yield "|---|---|"
    for kind, refine in (("float32", None), ("float16", None), ("int8", None), ("int8", 4)):
        name = f"{kind}, refine {refine}" if refine else kind
        yield f"| {name} | {_percent(retrieval.by_lance(kind, refine))} |"


def _percent(scores: tuple[float, float]) -> str:
    return " / ".join(f"{100 * score:.1f}" for score in scores)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--columns", nargs="+", default=["instance_image", "instance_title"])
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 192, 128, 96, 64, 32])
    args = parser.parse_args()
    table = Place(str(args.index)).open()
    if table is None:
        raise SystemExit(f"error: {args.index}: no index here; eclip embed makes one")
    for column in args.columns:
        retrieval = Retrieval(table, column)
        print(f"\n{column}: {len(retrieval.queries)} customer photos, {len(retrieval.pages)} detail pages, in %\n")
        print("\n".join(table_of_dims(retrieval, args.dims)), flush=True)
        print("\n" + "\n".join(table_of_kinds(retrieval)), flush=True)


if __name__ == "__main__":
    main()
