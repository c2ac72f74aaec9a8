"""Rows on disk, a part of them a Parquet file, so that a kill costs a part and ranks share the work by numbers.

    manifest.json           what is embedded by which model and how: work of other makings is not continued
    part-00000.parquet ...  written aside, flushed, renamed: a part is whole or absent

Which rows a part has follows from the number of images alone, so that any number of ranks may go on with it. A part's
own metadata says which images were left out and why.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eclip.files import sync_folder
from eclip.search.embed.encode import BATCH
from eclip.search.embed.schema import KEY

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "manifest.json"
_LARGEST = 2048  # images: some 20 MB of vectors and thumbnails, minutes of a CPU's work
_LEAST_PARTS = 64  # so that several ranks share a small catalogue too


class CannotKeep(ValueError):
    """A full disk, a missing permission. One line; what was finished before is still there."""


@contextmanager
def keeping(path: Path | str) -> Iterator[None]:
    """Turn an error of the disk into CannotKeep for `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise CannotKeep(
            f"{path}: cannot be written ({reason}); see to that and start the same command again, which goes on with "
            f"what is done, or choose another folder"
        ) from error


def part_size(images: int) -> int:
    """Images of a part: a multiple of the batch, so that no batch is cut."""
    wanted = -(-images // (_LEAST_PARTS * BATCH)) * BATCH
    return max(BATCH, min(_LARGEST, wanted))


@dataclass(frozen=True)
class Parts:
    """The parts of one embedding in a folder. `manifest` says of what; equal ones give equal rows."""

    folder: Path
    manifest: dict[str, Any]
    images: int

    @property
    def size(self) -> int:
        """Images of a part; the last one may have fewer."""
        return part_size(self.images)

    @property
    def count(self) -> int:
        """Parts in all."""
        return -(-self.images // self.size)

    def bounds(self, part: int) -> tuple[int, int]:
        """First row and the row after the last one."""
        return part * self.size, min((part + 1) * self.size, self.images)

    def path(self, part: int) -> Path:
        """The file of a part."""
        return self.folder / f"part-{part:05d}.parquet"

    def start(self, *, overwrite: bool) -> None:
        """Make the folder, or take up what an earlier start left in it.

        Raises ValueError for the work of another model, catalogue or other settings unless it may be overwritten, and
        for what no embedding wrote.
        """
        known = self._known()
        foreign = self._foreign(known)
        if foreign is not None:
            raise ValueError(f"{foreign}: no embedding wrote this; move it away or choose another folder")
        if known is not None and known != self.manifest:
            if not overwrite:
                other = _difference(known, self.manifest)
                raise ValueError(
                    f"{self.folder} holds unfinished or kept work of another making ({other}); choose another folder, "
                    f"or --overwrite to start afresh"
                )
            for path in self.folder.glob("part-*.parquet*"):
                path.unlink()
        with keeping(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f"{MANIFEST}.partial"
            partial.write_text(json.dumps(self.manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            partial.replace(self.folder / MANIFEST)

    def _known(self) -> dict[str, Any] | None:
        try:
            found = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _foreign(self, known: dict[str, Any] | None) -> Path | None:
        """A file of another program's that a start would write over: a manifest, or parts without one."""
        if known is None:
            return min(self.folder.glob("part-*"), default=None)
        ours = not known or "data fingerprint" in known  # empty: a manifest that cannot be read
        return None if ours else self.folder / MANIFEST

    def absent(self) -> list[int]:
        """The parts that are still to be made; one that cannot be read or is of another making counts as absent."""
        return [part for part in range(self.count) if self._facts(part) is None]

    def _facts(self, part: int) -> dict[str, Any] | None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            metadata = pq.read_schema(self.path(part)).metadata
            facts = json.loads(metadata[KEY])
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            return None
        return facts if facts.get("part") == part and facts.get("manifest") == self.manifest else None

    def write(self, part: int, table: "pa.Table", rejected: Sequence[tuple[str, str]]) -> None:
        """Keep a part. Raises CannotKeep."""
        import pyarrow.parquet as pq

        facts = {"part": part, "manifest": self.manifest, "rejected": list(rejected)}
        partial = self.path(part).with_suffix(f".parquet.{os.getpid()}.partial")
        with keeping(self.path(part)):
            try:
                # Vectors and JPEGs do not shrink; texts do, under their dictionaries.
                told = table.replace_schema_metadata({KEY: json.dumps(facts, ensure_ascii=False).encode()})
                with partial.open("wb") as file:
                    pq.write_table(told, file, compression="none")
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(self.path(part))
                sync_folder(self.folder)
            finally:
                partial.unlink(missing_ok=True)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator["pa.Table"]:
        """All parts in order, some or all columns."""
        import pyarrow.parquet as pq

        for part in range(self.count):
            yield pq.read_table(self.path(part), columns=None if columns is None else list(columns))

    def rejected(self) -> list[tuple[str, str]]:
        """Id and reason of every image that was left out."""
        found = [self._facts(part) or {} for part in range(self.count)]
        return [(name, reason) for facts in found for name, reason in facts.get("rejected", [])]


def _difference(known: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first thing that differs."""
    for name, value in wanted.items():
        if known.get(name) != value:
            return f"its {name}: {known.get(name)}, now {value}"
    return "its manifest cannot be read"
