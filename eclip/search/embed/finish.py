"""The rows of all parts as the table holds them: vectors narrowed, facets chosen, and the record that tells of it."""

import datetime
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eclip.inference import TrainedModel
from eclip.search.embed.indexes import VectorIndex
from eclip.search.embed.narrowing import Narrowing, choose, second_moment
from eclip.search.embed.parts import Parts
from eclip.search.embed.schema import FORMAT, KEY, table_schema, vector_columns

if TYPE_CHECKING:
    import pyarrow as pa

_MOST_VALUES = 200
"""Values of an attribute, beyond which it tells products apart rather than kinds of them."""
_SAMPLE = 4000  # vectors
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Census:
    """What one reading of the texts of all parts tells."""

    rows: int
    products: int
    facets: tuple[str, ...]
    """Names of the attributes to filter by."""


def count(parts: Parts, wanted: Sequence[str] = ()) -> Census:
    """Rows, products and facets. wanted: names of facets; () takes those with 2 to 200 values, fewer than products."""
    rows, products = 0, set[str]()
    values: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for table in parts.tables(["product", "facets"]):
        rows += len(table)
        products.update(table["product"].to_pylist())
        for facet in table["facets"].combine_chunks().flatten().to_pylist():
            name, _, value = facet.partition("=")
            if len(values[name]) <= _MOST_VALUES:
                values[name][value] += 1
    if wanted:
        if absent := [name for name in wanted if name not in values]:
            known = ", ".join(sorted(values)[:20]) or "no attribute that could be one"
            raise ValueError(f"--facets {absent[0]}: no product has it; the catalogue has {known}")
        return Census(rows, len(products), tuple(wanted))
    most = min(_MOST_VALUES, max(2, len(products) - 1))
    return Census(rows, len(products), tuple(sorted(name for name, found in values.items() if 2 <= len(found) <= most)))


def narrowing(parts: Parts, model: TrainedModel, dim: int | None) -> tuple[Narrowing | None, str]:
    """How vectors are made narrower (None: they are not), and a line about the loss."""
    encoder = model.encoder
    if dim is None or dim == encoder.embed_dim:
        return None, ""
    columns = vector_columns(encoder.has_decoder)
    step = -(-parts.images * len(columns) // _SAMPLE)
    moment, sample = np.zeros((encoder.embed_dim, encoder.embed_dim)), []
    for table in parts.tables(columns):
        for column in columns:
            block = matrix(table[column])
            moment += second_moment([block])
            sample.append(block[::step])
    return choose(moment, np.concatenate(sample), dim)


def matrix(column: Any) -> NDArray[np.float32]:
    """(n, D) of a column of vectors; n may be 0: of a part no image may be readable."""
    whole = column.combine_chunks()
    flat = np.asarray(whole.flatten().to_numpy(zero_copy_only=False), np.float32)
    return flat.reshape(len(whole), column.type.list_size)


def make_schema(
    model: TrainedModel,
    parts: Parts,
    census: Census,
    narrow: Narrowing | None,
    index: VectorIndex,
    *,
    vectors: str,
    making: str,
    rejected: int,
) -> "pa.Schema":
    """The table's schema with its record."""
    encoder = model.encoder
    dim = encoder.embed_dim if narrow is None else narrow.dim
    record = {
        "format": FORMAT,
        "model": str(Path(model.source).resolve()),  # whoever serves starts in another folder
        "fingerprint": encoder.fingerprint,
        "embed_dim": encoder.embed_dim,
        "image_size": encoder.image_size,
        "has_decoder": encoder.has_decoder,
        "threshold": model.threshold,
        "dim": dim,
        "vectors": vectors,
        "index": index.facts(),
        "rows": census.rows,
        "products": census.products,
        "facets": list(census.facets),
        "rejected": rejected,
        "data": parts.manifest["data"],
        "making": making,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    metadata = {KEY: json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")}
    if narrow is not None:
        metadata |= narrow.metadata()
    return table_schema(dim, has_decoder=encoder.has_decoder, vectors=vectors, metadata=metadata)


def batches(
    parts: Parts, schema: "pa.Schema", narrow: Narrowing | None, facets: Sequence[str]
) -> Iterator["pa.RecordBatch"]:
    """All rows in order, a part in memory at a time."""
    import pyarrow as pa

    for table in parts.tables():
        columns = [_column(table, field, narrow, set(facets)) for field in schema]
        yield from pa.Table.from_arrays(columns, schema=schema).to_batches(max_chunksize=_BATCH_ROWS)


def _column(table: "pa.Table", field: "pa.Field", narrow: Narrowing | None, facets: set[str]) -> Any:
    import pyarrow as pa

    column = table[field.name]
    if field.name == "facets":
        return pa.array([[f for f in row if f.partition("=")[0] in facets] for row in column.to_pylist()], field.type)
    if field.name in vector_columns(True):
        vectors = matrix(column) if narrow is None else narrow(matrix(column))
        flat = np.ascontiguousarray(vectors).reshape(-1).astype(field.type.value_type.to_pandas_dtype())
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), field.type.list_size)
    return column
