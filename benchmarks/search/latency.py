"""How long a query takes, and an index to make: `python -m benchmarks.search.latency --rows 10000 1000000`.

A table of made vectors (made.py) with the columns that a query reads, its indexes as `eclip embed` makes them; then one
query after another, as one customer would wait for them: median and 95th percentile. Recall@10 is against the flat
search. Below these single queries stand whole questions, by the functions that `eclip search` asks with: ten products,
by the sum of two columns, with the kind of index that so many rows get. A million rows take some minutes of two idle
cores and 4 GB of disk. Prints Markdown.
"""

import argparse
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.machine import versions
from benchmarks.search.made import COLOURS, KINDS, MadeCatalogue, title
from eclip.search.embed.indexes import METRIC, VectorIndex, plan, wanted_indexes
from eclip.search.embed.narrowing import Narrowing
from eclip.search.embed.store import connect
from eclip.search.query.fusion import Candidate, fold, fuse
from eclip.search.query.table import ImageTable, IndexFacts

COLUMN, SECOND = "instance_title", "text"
SHOWN = ["id", "product", "title", "category", "price"]
HITS, FUSED = 10, 50  # products that are shown, and that a hybrid question fuses
PROBES, REFINES = (5, 10, 20, 40, 80), (1, 10, 20)


def write(folder: Path, made: MadeCatalogue) -> Any:
    """The table, streamed."""
    import pyarrow as pa

    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("id", "product", "title", "category")),
            ("facets", pa.list_(pa.string())),
            ("price", pa.float64()),
            *((name, pa.list_(pa.float32(), made.dim)) for name in (COLUMN, SECOND)),
        ]
    )

    def batches() -> Iterator[pa.RecordBatch]:
        for numbers, products, vectors in made.blocks():
            named = [int(p) for p in products]
            columns = [
                pa.array([f"r{n}" for n in numbers]),
                pa.array([f"p{p}" for p in named]),
                pa.array([title(p) for p in named]),
                pa.array([KINDS[p // 7 % len(KINDS)] for p in named]),
                pa.array([[f"colour={COLOURS[p % len(COLOURS)]}"] for p in named], pa.list_(pa.string())),
                pa.array([float(p % 1000) for p in named]),
                # Both show one product, as its title and its picture do.
                *(
                    pa.FixedSizeListArray.from_arrays(pa.array(some.reshape(-1)), made.dim)
                    for some in (vectors, second_column(made, numbers, products))
                ),
            ]
            yield pa.record_batch(columns, schema=schema)

    reader = pa.RecordBatchReader.from_batches(schema, batches())
    return connect(str(folder)).create_table("images", data=reader, schema=schema)


def second_column(made: MadeCatalogue, numbers: Any, products: Any) -> Any:
    """(n, D): other pictures of the same products."""
    return made.vectors(products, np.random.default_rng([3, int(numbers[0])]))


def best_products(made: MadeCatalogue, asked: Any) -> list[list[str]]:
    """Of each question the products with the largest cosine to the sum of both columns, by comparing all."""
    scores = np.full((len(asked), len(made.products)), -1, np.float32)
    for numbers, products, vectors in made.blocks():
        total = vectors + second_column(made, numbers, products)
        cosines = asked @ (total / np.linalg.norm(total, axis=1, keepdims=True)).T
        for row, cosine in zip(scores, cosines, strict=True):
            np.maximum.at(row, products, cosine)
    return [[f"p{product}" for product in row] for row in np.argsort(-scores, axis=1)[:, :HITS]]


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Its result and seconds."""
    began = time.perf_counter()
    return call(), time.perf_counter() - began


def ask(calls: Sequence[Callable[[], Any]]) -> tuple[list[Any], str]:
    """Results of queries one after another, and "median / 95%" in ms. The first three are not counted: cold files."""
    for call in calls[:3]:
        call()
    pairs = [timed(call) for call in calls]
    times = sorted(1e3 * seconds for _, seconds in pairs)
    high = times[min(len(times) - 1, int(0.95 * len(times)))]
    return [result for result, _ in pairs], f"{statistics.median(times):.1f} / {high:.1f}"


def recall(found: Sequence[list[str]], exact: Sequence[list[str]]) -> float:
    """Share of the ten nearest that are found."""
    return float(np.mean([len(set(f) & set(e)) / len(e) for f, e in zip(found, exact, strict=True)]))


def measure(rows: int, dim: int, queries: int, folder: Path) -> list[str]:
    """Lines of Markdown for one size."""
    made = MadeCatalogue(rows, dim)
    table, seconds = timed(lambda: write(folder, made))
    lines = [f"\n### {rows:,} x {dim}\n", "| made | s | GB on disk | peak GB of the process |", "|---|---|---|---|"]
    lines.append(_made("rows written", seconds, folder))
    asked = made.queries(queries)
    words = [f"{title(7 * i).rsplit(' ', 1)[0]}" for i in range(queries)]

    def near(query: Any) -> Any:
        found = table.search(query, vector_column_name=COLUMN).distance_type(METRIC)
        return found.select(["id", "_distance"]).limit(10)

    def ids(builder: Any) -> list[str]:
        return list(builder.to_arrow()["id"].to_pylist())

    index, own = plan(rows, dim, "ivf_pq", "float32"), plan(rows, dim, "auto", "float32")
    wanted = {column: how for column, how in wanted_indexes(index, True).items() if column in table.schema.names}

    def build(column: str) -> None:
        _, seconds = timed(lambda: table.create_index(column, config=wanted[column]))
        lines.append(_made(f"index of {column}: {type(wanted[column]).__name__}", seconds, folder))

    def whole() -> list[str]:
        return questions(ImageTable(str(folder), table, facts(made, index)), asked, words, best_products(made, asked))

    for column in (name for name in wanted if name not in (COLUMN, SECOND)):
        build(column)
    few = asked if rows <= 50_000 else asked[: max(5, queries // 3)]
    exact, flat = ask([lambda q=q: ids(near(q)) for q in few])  # type: ignore[misc]
    asked_flat = whole() if own.kind == "flat" else []
    for column in (COLUMN, SECOND):
        build(column)
    lines += ["", "| query | ms, median / 95% | recall@10 |", "|---|---|---|", f"| flat | {flat} | 1 |"]

    def row(name: str, make: Callable[[int], Any], count: int, *, compared: bool = False) -> None:
        found, told = ask([lambda i=i: ids(make(i)) for i in range(count)])  # type: ignore[misc]
        lines.append(f"| {name} | {told} | {f'{recall(found, exact):.3f}' if compared else ''} |")

    for probes, refine in _settings(index):
        mark = " (the index's own setting)" if (probes, refine) == (index.nprobes, index.refine) else ""
        name = f"IVF_PQ, {probes} of {index.partitions} partitions, refine {refine}{mark}"
        row(
            name,
            lambda i, p=probes, r=refine: near(asked[i]).nprobes(p).refine_factor(r),  # type: ignore[misc]
            len(few),
            compared=True,
        )

    def tuned(i: int) -> Any:
        return near(asked[i]).nprobes(index.nprobes).refine_factor(index.refine)

    row("IVF_PQ, one category", lambda i: tuned(i).where(f"category = '{KINDS[i % len(KINDS)]}'"), queries)
    row(
        "IVF_PQ, one colour under a price",
        lambda i: tuned(i).where(f"array_has(facets, 'colour={COLOURS[i % 12]}') AND price < 500"),
        queries,
    )
    row("full text", lambda i: table.search(words[i], query_type="fts").select(["id", "_score"]).limit(10), queries)
    row("a row by its id", lambda i: table.search().where(f"id = 'r{(i * 7919) % rows}'").select(["id"]), queries)
    return lines + (asked_flat or whole())


def questions(table: ImageTable, asked: Any, words: Sequence[str], best: Sequence[list[str]]) -> list[str]:
    """Whole questions, without the model: ten products each, by vectors and by vectors and titles. best: see above."""
    count = HITS * -(-table.facts.rows // table.facts.products)

    def by_words(i: int) -> list[Candidate]:
        return fold(table.nearest_sum(asked[i], (COLUMN, SECOND), count))

    def hybrid(i: int) -> list[Candidate]:
        more = FUSED * count // HITS
        return fuse(
            fold(table.nearest_sum(asked[i], (COLUMN, SECOND), more)),
            fold(table.full_text(words[i], more)),
            by_product=True,
        )

    def told(find: Callable[[int], list[Candidate]]) -> tuple[list[list[dict[str, Any]]], str]:
        return ask([lambda i=i: table.read([c.row for c in find(i)[:HITS]], SHOWN) for i in range(len(words))])  # type: ignore[misc]

    (answers, summed), (_, fused) = told(by_words), told(hybrid)
    found = recall([[row["product"] for row in rows] for rows in answers], best)
    return [
        f"| a question of ten products: the sum of two columns | {summed} | {found:.3f} |",
        f"| and titles by full text, fused | {fused} | |",
    ]


def facts(made: MadeCatalogue, index: VectorIndex) -> IndexFacts:
    """What `eclip embed` would note of such a table."""
    return IndexFacts(
        model="",
        fingerprint="",
        embed_dim=made.dim,
        dim=made.dim,
        narrowing=Narrowing(made.dim),
        index=index,
        rows=made.rows,
        products=len(made.products),
    )


def _settings(index: VectorIndex) -> list[tuple[int, int]]:
    """Partitions to look into and refinement: what is tried."""
    sweep = [(probes, index.refine) for probes in PROBES if probes <= index.partitions]
    sweep += [(index.nprobes, refine) for refine in REFINES]
    return list(dict.fromkeys([*sweep, (index.nprobes, index.refine)]))


def _made(what: str, seconds: float, folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"| {what} | {seconds:.1f} | {size / 1e9:.2f} | {peak / 1e9:.2f} |"


def main() -> None:
    """Print a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="where the tables are made (default: a temporary folder)")
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in versions().items()), flush=True)
    for rows in args.rows:
        folder = Path(tempfile.mkdtemp(prefix="eclip-search-", dir=args.folder))
        try:
            print("\n".join(measure(rows, args.dim, args.queries, folder)), flush=True)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
