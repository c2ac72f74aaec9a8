"""A large array on disk that several processes fill together, and that a kill does not undo.

    NAME.npy            the whole array, float16; it appears by a rename, when the last part is in it
    NAME.partial        the array while it grows, with all its disk space from the beginning
    NAME.progress       what is computed (one line), then a character for each part: "#" done, "." not yet
    NAME.notes.jsonl    what `compute` had to say about single items
    NAME.lock           shared by those who fill, exclusive for who starts afresh

The items are cut into parts. A process takes a part by locking its character in the record; the kernel frees it when
the process ends, however that happens, and another process takes it then. Rows are synced to the disk before their part
is marked, so the record never promises what a crash could lose. Nobody writes through a memory map: on a full disk that
is SIGBUS, and a write is an error that can be told.
"""

import contextlib
import errno
import fcntl
import io
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from eclip.dataloading.errors import DataError
from eclip.files import sync_folder
from eclip.training.feature_cache.disk import (
    DTYPE,
    Notes,
    allocate,
    append_notes,
    byte_lock,
    damage,
    in_bytes,
    read_notes,
    write_all,
)

log = logging.getLogger(__name__)

_PART_BYTES = 64 << 20  # a kill costs at most one part of each process; a sync of 64 MB takes a disk less than a second
_LEAST_PARTS = 64  # so that several processes share a small array too
_IN_PROCESS = threading.Lock()  # record locks belong to a process: its threads take turns


class CannotStore(ValueError):
    """The disk is full or the folder cannot be written: one line for the user."""


@dataclass(frozen=True, kw_only=True)
class Filling:
    """An array and how to compute it.

    `compute(first, last)` gives items first..last-1, (last - first, *shape[1:]) float16, and notes on some of them. It
    is called with multiples of `batch` only, so a continued array is bit-equal to an unbroken one.
    """

    path: Path
    shape: tuple[int, ...]
    compute: Callable[[int, int], tuple[NDArray[np.float16], Notes]]
    batch: int
    settings: str = ""
    """Beyond what the file's name says: an unfinished array of other settings is not continued."""
    label: str = "computing"
    unit: str = "item"
    hint: str = "use another folder"
    """The way out when there is no room or no permission."""
    progress: bool = True

    def open(self) -> np.memmap:
        """The whole array, read-only; fills what is missing, together with every process that calls this meanwhile.

        Nothing here waits for another process but by a lock that the kernel frees when its holder dies. Raises
        CannotStore, and what `compute` raises: a ValueError ends the array, since the same input would raise it again;
        a DataError (a store that failed) and anything else leave it to be continued.
        """
        with _IN_PROCESS:
            self._discard_damaged()
            while (array := self._whole()) is None:
                with self._held(fcntl.LOCK_SH):
                    ready = self._is_started()
                    if ready:
                        self._fill()
                if not ready:
                    with self._held(fcntl.LOCK_EX):
                        if not self._is_started() and self._whole() is None:
                            self._start()
        return array

    def notes(self) -> Notes:
        """The notes of the whole array, by item."""
        return read_notes(self._beside("notes.jsonl"))

    def _whole(self) -> np.memmap | None:
        with self._told():
            try:
                return np.load(self.path, mmap_mode="r", allow_pickle=False)
            except FileNotFoundError:
                return None

    def _discard_damaged(self) -> None:
        with self._told():
            if not damage(self.path, self.shape):
                return
        with self._held(fcntl.LOCK_EX), self._told():
            if reason := damage(self.path, self.shape):  # nobody has replaced it meanwhile
                log.warning(
                    "%s: not a whole feature file (%s), as a stopped copy leaves it: computed again", self.path, reason
                )
                self.path.unlink()

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(f"{self.path.stem}.{suffix}")

    @cached_property
    def _items_per_part(self) -> int:
        item = int(np.prod(self.shape[1:])) * DTYPE.itemsize
        batches = -(-self.shape[0] // self.batch)
        return self.batch * max(1, min(batches // _LEAST_PARTS, _PART_BYTES // (item * self.batch)))

    @property
    def _parts(self) -> int:
        return -(-self.shape[0] // self._items_per_part)

    @cached_property
    def _array_header(self) -> bytes:
        stream = io.BytesIO()
        fields = {"descr": DTYPE.str, "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(stream, fields)
        return stream.getvalue()

    @cached_property
    def _record_header(self) -> bytes:
        what = {"shape": self.shape, "items_per_part": self._items_per_part, "settings": self.settings}
        return json.dumps(what).encode() + b"\n"

    @property
    def _size(self) -> int:
        return len(self._array_header) + int(np.prod(self.shape)) * DTYPE.itemsize

    def _is_started(self) -> bool:
        """Whether an array of these settings is there to be continued."""
        try:
            record = self._beside("progress").read_bytes()
            size = self._beside("partial").stat().st_size
        except OSError:
            return False
        marks = record[len(self._record_header) :]
        return (
            size == self._size
            and record.startswith(self._record_header)
            and len(marks) == self._parts
            and not marks.strip(b"#.")
        )

    def _start(self) -> None:
        """Allocate the array; the record comes last."""
        partial, record, unready = (self._beside(name) for name in ("partial", "progress", "progress.new"))
        with self._told():
            record.unlink(missing_ok=True)
            self._beside("notes.partial").unlink(missing_ok=True)
            try:
                with partial.open("wb") as file:
                    allocate(file.fileno(), self._size)
                    os.pwrite(file.fileno(), self._array_header, 0)
                    os.fsync(file.fileno())
                unready.write_bytes(self._record_header + b"." * self._parts)
                unready.replace(record)
            except BaseException:
                partial.unlink(missing_ok=True)
                unready.unlink(missing_ok=True)
                raise

    def _fill(self) -> None:
        """Compute the parts that nobody has, wait for those of others, give the array its name."""
        with contextlib.ExitStack() as stack:
            with self._told():
                try:
                    record = os.open(self._beside("progress"), os.O_RDWR)
                    stack.callback(os.close, record)
                    data = os.open(self._beside("partial"), os.O_RDWR)
                    stack.callback(os.close, data)
                except FileNotFoundError:  # a process that met an error has just removed them
                    return
            bar = stack.enter_context(
                tqdm(
                    total=self.shape[0],
                    initial=self._done(record),
                    desc=self.label,
                    unit=self.unit,
                    disable=not self.progress,
                )
            )
            try:
                self._take_parts(record, data, bar)
            except ValueError as error:
                if not isinstance(error, CannotStore | DataError):
                    self._remove()
                raise
            with self._told(), byte_lock(record, 0, wait=True):
                self._publish()

    def _publish(self) -> None:
        partial, notes = self._beside("partial"), self._beside("notes.partial")
        if not partial.exists():  # another process was faster
            return
        if notes.exists():
            notes.replace(self._beside("notes.jsonl"))
        else:
            self._beside("notes.jsonl").unlink(missing_ok=True)  # of an array that was here before
        partial.replace(self.path)
        sync_folder(self.path.parent)
        self._beside("progress").unlink(missing_ok=True)

    def _take_parts(self, record: int, data: int, bar: tqdm) -> None:
        for wait in (False, True):
            if wait and self._done(record) < self.shape[0]:
                log.warning("%s: waiting for the parts that other processes compute", self.path)
            for part in range(self._parts):
                if self._is_done(record, part):
                    continue
                with byte_lock(record, self._mark(part), wait=wait) as mine:
                    if mine and not self._is_done(record, part):
                        self._fill_part(record, data, part, bar)
                bar.n = self._done(record)  # with what others did meanwhile
                bar.refresh()

    def _fill_part(self, record: int, data: int, part: int, bar: tqdm) -> None:
        begin = part * self._items_per_part
        end = min(begin + self._items_per_part, self.shape[0])
        item = int(np.prod(self.shape[1:])) * DTYPE.itemsize
        notes: Notes = {}
        for first in range(begin, end, self.batch):
            last = min(first + self.batch, end)
            rows, said = self.compute(first, last)
            assert rows.shape == (last - first, *self.shape[1:]) and rows.dtype == DTYPE, (rows.shape, rows.dtype)
            notes |= said
            with self._told():
                write_all(data, np.ascontiguousarray(rows).data.cast("B"), len(self._array_header) + first * item)
            bar.update(last - first)
        with self._told():
            if notes:
                append_notes(self._beside("notes.partial"), notes)
            os.fdatasync(data)
            os.pwrite(record, b"#", self._mark(part))

    def _mark(self, part: int) -> int:
        """Place of a part's character in the record."""
        return len(self._record_header) + part

    def _is_done(self, record: int, part: int) -> bool:
        return os.pread(record, 1, self._mark(part)) == b"#"

    def _done(self, record: int) -> int:
        """Items in the parts that are done."""
        marks = os.pread(record, self._parts, self._mark(0))
        short = self._parts * self._items_per_part - self.shape[0] if marks.endswith(b"#") else 0
        return marks.count(b"#") * self._items_per_part - short

    def _remove(self) -> None:
        for suffix in ("progress", "partial", "notes.partial"):
            self._beside(suffix).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _held(self, mode: int) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            with self._told():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(self._beside("lock").open("a"))
                try:
                    fcntl.flock(lock, mode | fcntl.LOCK_NB)
                except BlockingIOError:
                    log.warning("%s: waiting for another process", lock.name)
                    fcntl.flock(lock, mode)
            try:
                yield
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn an error of the disk into one line."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise CannotStore(f"{self.path}: cannot be used ({error.strerror}); {self.hint}") from error
            free = shutil.disk_usage(self.path.parent).free
            kept = ""
            if self._is_started():
                kept = f"; what is computed stays in {self._beside('partial').name} and the next start continues"
            raise CannotStore(
                f"{self.path}: {error.strerror}: it needs {in_bytes(self._size)} and {in_bytes(free)} are free there; "
                f"free some, or {self.hint}{kept}"
            ) from error
