"""From finished parts to a complete index: a LanceDB table, streamed, with its indexes, that appears when it is whole.

In a folder the table is made in OUT/.eclip-embed/database and takes its place by a rename: what was there before is
searched until then. A database that is named by an address knows no rename: there the table is replaced in one commit,
and its indexes follow.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eclip.dataloading.system.lock import alone
from eclip.files import sync_folder
from eclip.search.embed import indexes
from eclip.search.embed.indexes import VectorIndex
from eclip.search.embed.parts import CannotKeep, keeping
from eclip.search.embed.schema import TABLE, need, record_of

if TYPE_CHECKING:
    import pyarrow as pa

WORK = ".eclip-embed"
"""Folder in an index that is being made; it goes when all is done. Nobody else has one of this name."""
_OLD = f"{TABLE}.old"
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_BUSY = "{}: being written now ({{holder}}); wait for it or choose another --out"


class Place:
    """Where an index lies: a folder, or a database with an address (s3://, gs://, db://, ...)."""

    def __init__(self, out: str) -> None:
        self.out = out
        self.is_address = bool(_ADDRESS.match(out))
        self.folder = None if self.is_address else Path(out)

    @property
    def work(self) -> Path | None:
        """The folder of unfinished work; None for an address."""
        return None if self.folder is None else self.folder / WORK

    def record(self) -> dict[str, Any] | None:
        """The record of the index that is there; None where there is none. Raises ValueError for a table that is none
        of ours, which nothing here replaces, and for a place that cannot be read."""
        if self.folder is not None and not (self.folder / f"{TABLE}.lance").exists():
            return None
        table = self.open()
        if table is None:
            return None
        record = record_of(table.schema)
        if record is None:
            raise ValueError(f"{self.out}: its table {TABLE!r} is no index of eclip embed; choose another --out")
        return record

    def open(self) -> Any:
        """The table; None where there is none."""
        return _open(self.out)

    @contextmanager
    def own(self) -> Iterator[None]:
        """Be the only one that writes there. Raises ValueError for another one, and for what is no folder."""
        if self.folder is None or self.work is None:
            yield
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder}: a file; choose a folder for --out")
        with keeping(self.folder):
            self.work.mkdir(parents=True, exist_ok=True)
        with alone(self.work / "lock", busy=_BUSY.format(self.out)):
            place, old = self.folder / f"{TABLE}.lance", self.work / _OLD
            if old.exists() and not place.exists():
                old.rename(place)  # a kill came between two renames
            yield

    def write(
        self,
        schema: "pa.Schema",
        batches: Iterable["pa.RecordBatch"],
        index: VectorIndex,
        tell: Callable[[str], None],
    ) -> Any:
        """Write the table and its indexes; the table. Streams: a batch is in memory at a time.

        What an earlier start of the same making wrote in full is taken. Raises CannotKeep.
        """
        where = self.out if self.work is None else str(self.work / "database")
        record = record_of(schema)
        assert record is not None
        with lance_errors(self.out):
            table = _open(where)
            if table is None or (record_of(table.schema) or {}).get("making") != record["making"]:
                table = _create(where, schema, batches)
            indexes.build(table, index, record["has_decoder"], tell)
            if self.folder is None:
                return table
            self._take_place()
            return self.open()

    def _take_place(self) -> None:
        """Put the finished table where it belongs; a kill between the two renames is repaired by the next start."""
        assert self.folder is not None and self.work is not None
        made, old = self.work / "database" / f"{TABLE}.lance", self.work / _OLD
        with keeping(self.folder):
            shutil.rmtree(old, ignore_errors=True)
            if (place := self.folder / f"{TABLE}.lance").exists():
                place.rename(old)
            made.rename(place)
            sync_folder(self.folder)

    def clean(self) -> None:
        """Remove the work folder of a finished index, what was replaced with it."""
        if self.work is not None:
            shutil.rmtree(self.work, ignore_errors=True)


def connect(where: str) -> Any:
    """A LanceDB database, by folder or address. Raises ValueError where the package is missing."""
    need("lancedb", "pyarrow")
    import lancedb

    return lancedb.connect(where)


def _create(where: str, schema: "pa.Schema", batches: Iterable["pa.RecordBatch"]) -> Any:
    import pyarrow as pa

    if not _ADDRESS.match(where):
        shutil.rmtree(where, ignore_errors=True)  # a writing that was killed
        os.makedirs(where, exist_ok=True)
    reader = pa.RecordBatchReader.from_batches(schema, batches)
    return connect(where).create_table(TABLE, data=reader, schema=schema, mode="overwrite")


def _open(where: str) -> Any:
    """The table of a database, or None."""
    if not _ADDRESS.match(where) and not os.path.isdir(where):
        return None
    try:
        return connect(where).open_table(TABLE)
    except (ValueError, FileNotFoundError) as error:
        if "not found" in str(error).lower() or "does not exist" in str(error).lower():
            return None
        raise ValueError(f"{where}: cannot be opened ({_short(error)})") from error
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{where}: cannot be opened ({_short(error)})") from error


@contextmanager
def lance_errors(out: str) -> Iterator[None]:
    """LanceDB's errors of many kinds, with their trees of causes, as one line."""
    try:
        yield
    except CannotKeep:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise CannotKeep(
            f"{out}: cannot be written ({_short(error)}); see to that and start the same command again, which goes on "
            f"with what is done"
        ) from error


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
