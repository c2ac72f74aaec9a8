"""How long a query takes, and an index to make: `python -m benchmarks.search.latency --rows 10000 1000000`.

A table of made vectors (made.py) with the columns that a query reads, its indexes as `eclip embed` makes them; then one
query after another, as one customer would wait for them: median and 95th percentile. Recall@10 is against the flat
search. A million rows take some minutes of two idle cores, 2.3 GB of memory and 1.7 GB of disk. Prints Markdown.
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
from eclip.search.embed.store import connect

COLUMN = "global"
PROBES, REFINES = (5, 10, 20, 40, 80), (1, 10, 20)


def write(folder: Path, made: MadeCatalogue) -> Any:
    """The table, streamed."""
    import pyarrow as pa

    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("id", "product", "title", "category")),
            ("facets", pa.list_(pa.string())),
            ("price", pa.float64()),
            (COLUMN, pa.list_(pa.float32(), made.dim)),
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
                pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), made.dim),
            ]
            yield pa.record_batch(columns, schema=schema)

    reader = pa.RecordBatchReader.from_batches(schema, batches())
    return connect(str(folder)).create_table("images", data=reader, schema=schema)


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

    few = asked if rows <= 50_000 else asked[: max(5, queries // 3)]
    exact, flat = ask([lambda q=q: ids(near(q)) for q in few])  # type: ignore[misc]
    index = plan(rows, dim, "ivf_pq", "float32")
    for column, how in wanted_indexes(index, False).items():
        if column in table.schema.names:
            _, seconds = timed(lambda column=column, how=how: table.create_index(column, config=how))  # type: ignore[misc]
            lines.append(_made(f"index of {column}: {type(how).__name__}", seconds, folder))
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
    row(
        "hybrid (IVF_PQ and full text, reciprocal ranks)",
        lambda i: (
            table.search(query_type="hybrid", vector_column_name=COLUMN)
            .vector(asked[i])
            .text(words[i])
            .distance_type(METRIC)
            .nprobes(index.nprobes)
            .refine_factor(index.refine)
            .select(["id"])
            .limit(10)
        ),
        queries,
    )
    row("a row by its id", lambda i: table.search().where(f"id = 'r{(i * 7919) % rows}'").select(["id"]), queries)
    return lines


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
