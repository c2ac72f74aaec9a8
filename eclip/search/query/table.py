"""The LanceDB table of an index: opened and checked, nearest vectors, full text, rows.

LanceDB gives distances; scores here are cosines, larger is better. Threads may share a table.
"""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eclip.inference import TrainedModel
from eclip.search.embed.finish import matrix
from eclip.search.embed.indexes import METRIC, VectorIndex
from eclip.search.embed.narrowing import Narrowing
from eclip.search.embed.schema import FORMAT, TABLE, need, record_of
from eclip.search.embed.store import connect
from eclip.search.query.filters import quoted
from eclip.search.query.fusion import Candidate

_SUMMED = 200  # candidates of each column that are compared by the sum
_REFINED = 400  # whole vectors that an approximate index reads for a question's column; more find no more
_ROW = ("id", "product", "title", "category", "attributes", "price", "image", "source", "width", "height")
_BOXES = ("box_image", "box_title")


class UnreadableIndex(ValueError):
    """The index is damaged or gone: no fault of whoever asks it."""


class NoSuchImage(ValueError):
    """No row of the table has this id."""


@dataclass(frozen=True, kw_only=True)
class IndexFacts:
    """What an index says of itself."""

    model: str
    """Where the model lay that made the vectors."""
    fingerprint: str
    """`Encoder.fingerprint` of it."""
    embed_dim: int
    """The model's width."""
    dim: int
    """Width of the stored vectors, less than the model's where they were made narrower."""
    narrowing: Narrowing
    """From the model's vectors to stored ones."""
    index: VectorIndex
    """How vectors are found."""
    rows: int
    products: int


class ImageTable:
    """The table `images` of an index, one row an image."""

    def __init__(self, index: str, table: Any, facts: IndexFacts) -> None:
        """Use `ImageTable.open`."""
        self.index, self.facts, self._table = index, facts, table
        self.columns: set[str] = set(table.schema.names)
        with reading(index):
            kinds = {config.columns[0]: config.index_type.lower() for config in table.list_indices()}
        self._indexed = {column for column, kind in kinds.items() if kind.startswith("ivf")}
        self.has_full_text = kinds.get("title") in ("fts", "inverted")

    @classmethod
    def open(cls, index: str | Path) -> "ImageTable":
        """Open an index: a folder, or an address that LanceDB knows. Raises ValueError when there is none, or none that
        can be read."""
        name = str(index)
        need("lancedb", "pyarrow")
        if "://" not in name and not Path(name).is_dir():
            raise ValueError(f"{name}: no such folder; eclip embed --out {name} makes an index")
        with reading(name):
            database = connect(name)
            there = TABLE in database.list_tables().tables
        if not there:
            raise ValueError(
                f"{name}: no index here (no table {TABLE!r}), or one that is not complete; eclip embed --out {name} "
                f"makes it, and goes on where it was stopped"
            )
        with reading(name):
            table = database.open_table(TABLE)
            rows, schema = table.count_rows(), table.schema
        facts = _facts(name, schema, rows)
        if not rows:
            raise ValueError(f"{name}: the index is empty; eclip embed --out {name} fills it")
        return cls(name, table, facts)

    def check_model(self, model: TrainedModel) -> None:
        """Raise ValueError for a model that did not make these vectors."""
        if model.encoder.fingerprint != self.facts.fingerprint:
            raise ValueError(
                f"{model.source}: not the model that made {self.index} (its fingerprint is "
                f"{model.encoder.fingerprint[:12]}, the index has {self.facts.fingerprint[:12]}); give that one with "
                f"--model (it lay at {self.facts.model}), or embed again"
            )

    def require_full_text(self) -> None:
        """Raise ValueError without a full-text index on titles."""
        if not self.has_full_text:
            raise ValueError(
                f"{self.index}: hybrid asks a full-text index on titles, and there is none; embed again or leave it out"
            )

    def require_whole(self, column: str, what: str) -> None:
        """Raise ValueError where a column of vectors is absent or truncated."""
        if column not in self.columns:
            raise ValueError(no_decoder(what))
        if self.facts.dim != self.facts.embed_dim:
            raise ValueError(
                f"{self.index}: {what} needs whole vectors of {self.facts.embed_dim} numbers, and these were cut to "
                f"{self.facts.dim}; embed without --dim"
            )

    def fit(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """A model's vector (D,) as the stored ones are: perhaps of fewer numbers, of unit length."""
        return self.facts.narrowing(vector[None])[0]

    def count(self, where: str | None = None) -> int:
        """Rows that fulfil some SQL."""
        with reading(self.index):
            return int(self._table.count_rows(where))

    def nearest(
        self, vector: NDArray[np.float32], column: str, count: int, where: str | None = None, *, exact: bool = False
    ) -> list[Candidate]:
        """The rows whose vectors are most similar to `vector` (D,), best first; fewer where no more fulfil `where`.

        exact: every vector is compared, with an index of vectors too.
        """
        approximate = column in self._indexed and not exact
        found = self._nearest(vector, column, count, where, approximate=approximate)
        if approximate and len(found) < count:
            # A filter left too little in the partitions that were looked into. To let LanceDB look on from the start
            # (maximum_nprobes) costs every question of a million rows 40 ms instead of 6.
            found = self._nearest(vector, column, count, where, approximate=True, everywhere=True)
        scores = 1 - found["_distance"].to_numpy()
        rows, products = found["_rowid"].to_pylist(), found["product"].to_pylist()
        return [Candidate(row, product, float(s)) for row, product, s in zip(rows, products, scores, strict=True)]

    def _nearest(
        self,
        vector: NDArray[np.float32],
        column: str,
        count: int,
        where: str | None,
        *,
        approximate: bool,
        everywhere: bool = False,
    ) -> Any:
        """An Arrow table of `product`, `_distance` and `_rowid`, the nearest first."""
        with reading(self.index):
            asked = self._table.search(vector, vector_column_name=column, query_type="vector").distance_type(METRIC)
            if approximate:
                plan = self.facts.index
                asked = asked.nprobes(plan.nprobes).refine_factor(max(1, min(plan.refine, _REFINED // count)))
                if everywhere:
                    asked = asked.maximum_nprobes(0)
            else:
                asked = asked.bypass_vector_index()
            if where is not None:
                asked = asked.where(where, prefilter=True)
            return asked.limit(count).with_row_id(True).select(["product", "_distance"]).to_arrow()

    def nearest_sum(
        self, vector: NDArray[np.float32], columns: Sequence[str], count: int, where: str | None = None
    ) -> list[Candidate]:
        """As `nearest`, compared with the sum of several columns of unit vectors.

        Of each column the `count` nearest are compared (at least 200: the sum's nearest need not be a column's), so the
        result has `count` to as many times that as there are columns.
        """
        if len(columns) == 1:
            return self.nearest(vector, columns[0], count, where)
        count = max(count, _SUMMED)
        found = {c.row: c for column in columns for c in self.nearest(vector, column, count, where)}
        scores = self.cosines(vector, columns, list(found))
        order = np.argsort(-scores, kind="stable")
        candidates = list(found.values())
        return [replace(candidates[i], score=float(scores[i])) for i in order]

    def cosines(self, vector: NDArray[np.float32], columns: Sequence[str], rows: Sequence[int]) -> NDArray[np.float32]:
        """(n,) of a unit vector and the sums of columns of rows."""
        found = self.vectors(columns, rows)
        total = np.sum([found[column] for column in columns], axis=0)
        return np.asarray(total @ vector / np.maximum(np.linalg.norm(total, axis=1), 1e-12), dtype=np.float32)

    def vectors(self, columns: Sequence[str], rows: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        """Columns of vectors, (n, D) each, of rows by LanceDB's row ids, in their order."""
        if not rows:
            return {column: np.zeros((0, self.facts.dim), dtype=np.float32) for column in columns}
        with reading(self.index):
            found = self._table.take_row_ids(list(rows)).with_row_id().select(list(columns)).to_arrow()
        place = {row: i for i, row in enumerate(found["_rowid"].to_pylist())}
        order = [place[row] for row in rows]
        return {column: matrix(found[column])[order] for column in columns}

    def full_text(self, words: str, count: int, where: str | None = None) -> list[Candidate]:
        """The rows whose titles have some of the words, best first (BM25)."""
        query = importlib.import_module("lancedb.query").MatchQuery(words, "title")
        with reading(self.index):
            asked = self._table.search(query, query_type="fts")
            if where is not None:
                asked = asked.where(where, prefilter=True)
            found = asked.limit(count).with_row_id(True).select(["product", "_score"]).to_arrow()
        columns = (found[name].to_pylist() for name in ("_rowid", "product", "_score"))
        return [Candidate(*row) for row in zip(*columns, strict=True)]

    def rows(self, ids: Sequence[int], *, thumbnails: bool = False) -> list[dict[str, Any]]:
        """All of rows but their vectors, in the order of LanceDB's row ids."""
        wanted = [*_ROW, *(box for box in _BOXES if box in self.columns), *(["thumbnail"] if thumbnails else [])]
        return self.read(ids, wanted) if ids else []

    def read(self, ids: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Some columns of rows by LanceDB's row ids, in their order."""
        with reading(self.index):
            found = self._table.take_row_ids(list(ids)).with_row_id().select(list(columns)).to_arrow()
        by_id = {row["_rowid"]: row for row in found.to_pylist()}
        return [by_id[row] for row in ids]

    def find(self, image_id: str, columns: Sequence[str]) -> dict[str, Any]:
        """Some columns of the row with this `id`. Raises NoSuchImage."""
        with reading(self.index):
            rows = self._table.search().where(f"id = {quoted(image_id)}").limit(1).select(list(columns)).to_list()
        if not rows:
            raise NoSuchImage(f"no image {image_id!r} in {self.index}")
        return dict(rows[0])

    def scan(self, columns: Sequence[str], where: str | None = None) -> Any:
        """Some columns and `_rowid` of all rows, or of those that fulfil some SQL: a pyarrow.Table."""
        with reading(self.index):
            asked = self._table.search().with_row_id(True).select(list(columns))
            return (asked if where is None else asked.where(where)).limit(max(self.facts.rows, 1)).to_arrow()


@contextmanager
def reading(index: str) -> Iterator[None]:
    """Whatever LanceDB raises in the block, as one line about this index."""
    try:
        yield
    except NoSuchImage:
        raise
    except Exception as error:  # RuntimeError, OSError, ValueError and more, with Rust's backtraces in them
        reason = " ".join(str(error).split())[:300]
        raise UnreadableIndex(f"{index}: the index cannot be read ({reason}); make it anew with eclip embed") from error


def no_decoder(what: str) -> str:
    """A line for what a model without instance decoder cannot do."""
    return (
        "the model of this index was trained without the instance decoder (--objective clip): it knows whole pictures "
        f"alone, which does not suffice for {what}"
    )


def _facts(index: str, schema: Any, rows: int) -> IndexFacts:
    """Out of the schema's metadata. Raises ValueError for what is none of ours."""
    told = record_of(schema)
    if told is None:
        raise ValueError(f"{index}: the table {TABLE!r} is none that eclip embed wrote; give --index another place")
    if told.get("format") != FORMAT:
        raise ValueError(
            f"{index}: an index of format {told.get('format')}, and this version reads {FORMAT}; make it anew with "
            f"eclip embed"
        )
    try:
        return IndexFacts(
            model=str(told["model"]),
            fingerprint=str(told["fingerprint"]),
            embed_dim=int(told["embed_dim"]),
            dim=int(told["dim"]),
            narrowing=Narrowing.of_index(told, schema.metadata),
            index=VectorIndex.of_record(told),
            rows=rows,
            products=int(told.get("products") or rows),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index}: its record is not complete ({error!r}); make it anew with eclip embed") from error
